"""A simulation of a whole swarm: the real conductor and the real sessions over a virtual network and a virtual clock.

Everything that happens follows from one seed: which nodes are slow, which frames are lost, who leaves and comes back,
when the coordinator is killed. A failure is therefore found again with its seed. When the last round is done, the
network calms down; but every connection breaks once more, the coordinator is killed once more, and everybody must
find to the end all the same. What is not real: sockets, the files under ledger and snapshots, losses (codes are
random), and that nodes at the same point of the chain share their weights; `witnesses` hold and compute their own.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from coordinator.conductors import AgentEffect, Conductors
from coordinator.config import ServiceConfig
from coordinator.effects import (
    Effect,
    Enrol,
    Note,
    Persist,
    PersistCheckpoint,
    Quarantine,
    Send,
    SendPiece,
    send,
)
from coordinator.membership import FAREWELL_S
from coordinator.roster import Enrolment, Roster
from coordinator.virtual_track import VirtualTrack
from transport.exits import Exit
from transport.messages import (
    FromCoordinator,
    FromMember,
    WireError,
    address,
    addressed,
    decode_from_coordinator,
)
from transport.session import Applied, End, Jumped, Keep, Open, Session, StartOver, Transmit
from transport.sessions import AgentEffect as SessionEffect
from transport.sessions import Sessions
from zo.commit import COMMIT_TAG, Commit, Entry, decode_entry
from zo.manifest import MOVES, Audits, Manifest, validate
from zo.packing import expressible
from zo.replica import Replica

_RECONNECT_S: Final = 0.5
_TICK_S: Final = 1.0
_USUAL: Final = 55
_SIZE: Final = 64
_REMEMBERED_ENTRIES: Final = 1024


class SimulationError(RuntimeError):
    """A promise that did not hold; the message says which, and the seed that shows it again."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated."""

    nodes: int = 1000
    rounds: int = 1000
    seed: int = 1
    churn: float = 0.2
    """Share of the nodes that leave, and as many that come (back), in a round."""
    loss: float = 0.1
    """Share of the frames that never arrive."""
    slow: float = 0.02
    """Share of the nodes that are a hundred times slower than the others."""
    probe_s: float = 1.0
    """Median time of a probe."""
    latency_s: float = 0.1
    """Median time of a frame on its way."""
    coordinator_kills: int = 2
    mass_loss: float = 0.0
    """Share of the nodes that vanish at once, half way."""
    witnesses: int = 8
    """Nodes that compute weights of their own."""


class SimulationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    seed: int
    agents: int
    rounds: int
    """Of each agent."""
    virtual_s: float
    reports_counted: int
    reports_late: int
    joins: int
    leaves: int
    frames_lost: int
    coordinator_kills: int
    longest_round_s: float
    median_round_s: float
    deadline_at_mass_loss_s: float | None
    """How long the round could wait in which the nodes vanished, as learned from those before; None if none did."""
    round_after_mass_loss_s: float | None
    """How long the round took in which they vanished."""
    leaps: int
    """How often a node went on from a snapshot."""
    nodes_at_the_end: int
    """Nodes that were there when the last round was done; all of them learned so, and have the final digest."""
    digest: str
    """Of agent 0's weights."""


@dataclass
class _Node:
    number: int
    key: bytes
    probe_s: float
    is_witness: bool
    moves: bool
    """Whether it reports moves instead of slopes."""
    agents: tuple[int, ...] | None
    """Those that it names; None where every node trains all."""
    sessions: Sessions | None = None
    connection: int = 0
    """Counts connections: what was sent over an older one never arrives."""
    up_at: float = 0.0
    """When the last frame that it sent arrives: those of one connection stay in order, as TCP keeps them."""
    down_at: float = 0.0
    """The same of the last frame that was sent to it."""
    is_up: bool = False
    is_probing: bool = False
    has_manifest: bool = False
    """Whether this process of it knows the manifest."""
    saved: dict[int, tuple[Manifest, Replica]] = field(default_factory=dict)
    """By agent."""
    has_finished: bool = False
    """Whether it ended since the run is over, with the right digest."""


@dataclass
class _World:
    """The virtual network, its clock, and the durable part of the coordinator."""

    manifest: Manifest
    scenario: Scenario
    progress: Callable[[int, int], None]
    rng: random.Random = field(init=False)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.scenario.seed)
        self.tracks = [
            VirtualTrack(self.manifest, agent, self.fail) for agent in range(self.manifest.agents.count)
        ]
        self._expressible = expressible(self.manifest.codes.bits)
        # Nothing normalises moves, and made-up codes do not shrink as the exponent grows: these have an RMS near 32.
        self._usual = self._expressible[np.abs(self._expressible.astype(np.int16)) <= _USUAL]
        self.is_calm = False
        self.is_served = True
        self.at_the_end: list[_Node] = []
        """Who was up when the last round was done."""
        self._entry_by_frame: dict[bytes, Entry] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.nodes: list[_Node] = []
        self.node_by_session: dict[bytes, _Node] = {}
        self.generation = 0
        self.lost = self.joins = self.leaves = self.kills = self.counted = self.late = self.leaps = 0
        self.mass_lost_in: int | None = None
        self.mass_deadline: float | None = None
        self._wake_at: float | None = None
        """When the conductor's deadline is due."""
        self.conductors = self._start_conductors()

    # ---- time -------------------------------------------------------------------------------------------------------

    def at(self, delay: float, action: Callable[[], None], not_before: float = 0.0) -> float:
        """Do something after `delay` seconds; when that is."""
        self._sequence += 1
        when = max(self.now + delay, not_before)
        heapq.heappush(self._events, (when, self._sequence, action))
        return when

    def run(self) -> None:
        """Until nobody is owed the run's end any more, or nothing can happen any more."""
        limit = self.scenario.rounds * 100 * (self.scenario.probe_s + 2 * self.scenario.latency_s) + 3600
        while self.is_served and (self._events or self._wake_at is not None):
            if self._wake_at is None or (self._events and self._events[0][0] <= self._wake_at):
                self.now, _, action = heapq.heappop(self._events)
                action()
            else:
                self.now = max(self.now, self._wake_at)
                self.carry_out(self.conductors.on_tick(self.now))
            if self.now > limit:
                behind = min(each.round for each in self.conductors)
                self.fail(f"round {behind} did not close within {limit:.0f} virtual seconds")

    def fail(self, what: str) -> None:
        raise SimulationError(
            f"{what} (seed {self.scenario.seed}: `simulate --seed {self.scenario.seed}` shows it again)"
        )

    # ---- the coordinator ------------------------------------------------------------------------------------------

    def _start_conductors(self) -> Conductors:
        config = ServiceConfig(quorum=max(1, self.scenario.nodes // 50), capacity=4096)
        roster = Roster(each for track in self.tracks for each in track.enrolled)
        return Conductors([track.start_conductor(config, roster, self.now) for track in self.tracks])

    def kill_coordinator(self) -> None:
        """SIGKILL and a restart: memory is gone, the ledger is not."""
        self.kills += 1
        self.generation += 1
        self.conductors = self._start_conductors()
        self._wake_at = None
        self._break_connections(_RECONNECT_S)

    def _break_connections(self, mean_s: float) -> None:
        """All at once; everybody is back after half to one and a half times `mean_s`."""
        for node in self.nodes:
            if node.is_up and node.sessions is not None:
                self.node_by_session.pop(self._session_id(node), None)
                node.connection += 1
                node.sessions.on_link_down()
                self.at(mean_s * (0.5 + self.rng.random()), self._reconnection(node, node.connection))

    def _calm_down(self) -> None:
        """The last round is done. No frame is lost from now on, but everything breaks off once more."""
        self.is_calm = True
        self.at_the_end = [node for node in self.nodes if node.is_up]
        self._break_connections(FAREWELL_S / 2)
        if self.scenario.coordinator_kills:
            self.at(self.rng.random(), self.kill_coordinator)
        self._tick_conductor()

    def _tick_conductor(self) -> None:
        """As the service does at the end."""
        self.carry_out(self.conductors.on_tick(self.now))
        self.is_served = self.conductors.owe_the_end(self.now)
        self.at(_TICK_S, self._tick_conductor)

    def carry_out(self, effects: list[AgentEffect]) -> None:
        for agent, effect in effects:
            self._do(agent, effect)
        for agent, effect in self.conductors.settle():
            self._do(agent, effect)
        self._wake_at = self.conductors.wake_at()
        deadline = self.conductors[0].wake_at()
        if deadline is not None and self.conductors[0].round == self.mass_lost_in:
            self.mass_deadline = deadline - self.tracks[0].opened_at

    def _do(self, agent: int, effect: Effect) -> None:
        match effect:
            case Send(session, _, frame):
                node = self.node_by_session.get(session)
                if node is not None:
                    self._deliver(node, address(frame, agent))
            case Persist(commit=commit, frame=frame, nodes=nodes):
                self._persist(self.tracks[agent], commit, frame, len(nodes) + len(commit.movers))
            case PersistCheckpoint(round, digest, scale):
                self.tracks[agent].checkpoint(round, digest, scale)
            case Enrol(node_number, key, name):
                self.tracks[agent].enrolled.append(Enrolment(node_number, key, name))
            case Quarantine(node_number):
                self.fail(f"node {node_number} was quarantined, and nobody is faulty")
            case SendPiece(session, content, offset):
                self._do(agent, send(session, self.tracks[agent].piece(content, offset)))
            case Note(kind, node_number, text):
                if kind in ("diverged", "misfit"):
                    self.fail(text)
                if node_number is not None:
                    self.tracks[agent].note(kind, node_number)

    def _persist(self, track: VirtualTrack, commit: Commit, frame: bytes, num_reports: int) -> None:
        track.persist(commit, frame, self.now)
        self.counted += num_reports
        self.late += len(commit.late)
        scenario = self.scenario
        done = min(len(each.frames) for each in self.tracks)
        self.progress(done, scenario.rounds)
        if done == scenario.rounds:
            self.at(0.0, self._calm_down)  # once this commit is sent
        if track.agent or track.truth.round == scenario.rounds:
            return  # what happens in a round happens in those of agent 0
        self._churn()
        if scenario.mass_loss and commit.round == scenario.rounds // 2:
            self.mass_lost_in = commit.round + 1
            chosen = self.rng.sample(range(len(self.nodes)), round(scenario.mass_loss * len(self.nodes)))
            for index in chosen:
                self._vanish(self.nodes[index])
        kills = [
            scenario.rounds * (i + 1) // (scenario.coordinator_kills + 1)
            for i in range(scenario.coordinator_kills)
        ]
        if commit.round in kills:
            self.at(self.rng.random() * scenario.probe_s, self.kill_coordinator)

    # ---- nodes ------------------------------------------------------------------------------------------------------

    def populate(self) -> None:
        """Make all nodes; they come within the first seconds."""
        for number in range(self.scenario.nodes):
            speed = 100.0 if self.rng.random() < self.scenario.slow else self.rng.lognormvariate(0.0, 0.25)
            node = _Node(
                number=number,
                key=number.to_bytes(32, "big"),
                probe_s=self.scenario.probe_s * speed,
                is_witness=number < self.scenario.witnesses,
                moves=bool(self.manifest.moves.projections) and number % 3 == 1,
                agents=self._chosen_agents(number),
            )
            self.nodes.append(node)
            self.at(self.rng.random() * self.scenario.probe_s, self._boot(node))

    def _chosen_agents(self, number: int) -> tuple[int, ...] | None:
        """What a node names at join, where it does: one agent in turn, so that each has nodes, and some others."""
        count = len(self.tracks)
        if self.manifest.agents.assignment == "all":
            return None
        return tuple(agent for agent in range(count) if agent == number % count or self.rng.random() < 0.5)

    def _boot(self, node: _Node) -> Callable[[], None]:
        def boot() -> None:
            if node.is_up or self.is_calm:
                return
            node.is_up = True
            node.is_probing = False
            node.connection += 1
            self.joins += 1
            node.has_manifest = False
            node.sessions = Sessions(node.agents, self._new_session(node))
            self._connect(node)
            self.at(_TICK_S, self._ticking(node, node.sessions))

        return boot

    def _new_session(self, node: _Node) -> Callable[[int], Session]:
        base, tokenizer = self.manifest.base.digest, self.manifest.base.tokenizer_digest

        def make(agent: int) -> Session:
            return Session(
                self.manifest.run_id,
                bytes.fromhex(base),
                bytes.fromhex(tokenizer),
                f"n{node.number}",
                node.saved.get(agent),
                decode=self._decode_entry,
                agent=agent,
                estimator=MOVES if node.moves else "",
            )

        return make

    def _reconnection(self, node: _Node, connection: int) -> Callable[[], None]:
        def reconnect() -> None:
            if node.is_up and node.connection == connection:
                self._connect(node)

        return reconnect

    def _connect(self, node: _Node) -> None:
        assert node.sessions is not None
        self.node_by_session[self._session_id(node)] = node
        self._node_does(node, node.sessions.on_link_up())

    def _session_id(self, node: _Node) -> bytes:
        return node.number.to_bytes(4, "big") + node.connection.to_bytes(4, "big")

    def _ticking(self, node: _Node, sessions: Sessions) -> Callable[[], None]:
        def tick() -> None:
            if node.is_up and node.sessions is sessions:
                self._node_does(node, sessions.on_tick(self.now))
                self.at(_TICK_S * 5, tick)

        return tick

    def _churn(self) -> None:
        count = self.scenario.churn * self.scenario.nodes / 2
        for _ in range(int(count) + (self.rng.random() < count % 1)):
            node = self.rng.choice(self.nodes)
            if node.is_up:
                if self.rng.random() < 0.5 and node.sessions is not None:
                    self._node_does(node, node.sessions.leave())  # in good order
                self._vanish(node)
            else:
                self.at(self.rng.random() * self.scenario.probe_s, self._boot(node))

    def _vanish(self, node: _Node) -> None:
        if not node.is_up:
            return
        self.leaves += 1
        node.is_up = False
        self.node_by_session.pop(self._session_id(node), None)
        sessions, node.sessions = node.sessions, None
        for agent, session in sessions.by_agent.items() if sessions is not None else ():
            replica = session.replica
            if replica is None:
                continue
            # What it saved is from some time ago, or lost.
            node.saved.pop(agent, None)
            if self.rng.random() < 0.7:
                if node.is_witness:
                    replica = Replica(
                        self.manifest,
                        replica.weights,
                        replica.round,
                        replica.head,
                        agent,
                        replica.state,
                        replica.pool,
                    )
                node.saved[agent] = self.manifest, replica

    def _is_lost(self) -> bool:
        """Whether a frame never arrives."""
        is_lost = not self.is_calm and self.rng.random() < self.scenario.loss
        self.lost += is_lost
        return is_lost

    def _latency(self) -> float:
        """Time of a frame on its way, in seconds."""
        return self.scenario.latency_s * self.rng.lognormvariate(0.0, 0.3)

    def _deliver(self, node: _Node, frame: bytes) -> None:
        if self._is_lost():
            return
        connection = node.connection

        def arrive() -> None:
            if node.is_up and node.connection == connection and node.sessions is not None:
                agent, bare = addressed(frame)
                self._node_does(node, node.sessions.on_message(agent, self._decode(bare), self.now))

        node.down_at = self.at(self._latency(), arrive, node.down_at)

    def _decode(self, frame: bytes) -> FromCoordinator:
        if frame[1] == COMMIT_TAG:  # after the array's header; the same object for all, as from a history
            entry = self._decode_entry(frame)
            assert isinstance(entry, Commit)
            return entry
        try:
            return decode_from_coordinator(frame)
        except WireError as error:
            self.fail(f"the coordinator sent what is no message: {error}")
            raise

    def _decode_entry(self, frame: bytes) -> Entry:
        entry = self._entry_by_frame.get(frame)
        if entry is None:
            entry = self._entry_by_frame[frame] = decode_entry(frame)
            if len(self._entry_by_frame) > _REMEMBERED_ENTRIES:
                del self._entry_by_frame[next(iter(self._entry_by_frame))]
        return entry

    def _node_does(self, node: _Node, effects: Sequence[SessionEffect]) -> None:
        sessions = node.sessions
        for agent, effect in effects:
            if sessions is None:
                return
            session, track = sessions.by_agent[agent], self.tracks[agent]
            match effect:
                case Transmit(message):
                    self._send_up(node, agent, message)
                case Open(manifest):
                    if session.replica is None:
                        fresh = track.fresh() if node.is_witness else track.shared()
                        self._node_does(node, sessions.opened(agent, fresh, self.now))
                    if not node.has_manifest:
                        node.has_manifest = True
                        self._node_does(node, sessions.on_manifest(manifest))
                case StartOver(reason):
                    self.fail(f"node {node.number} was told to start over: {reason}")
                case Jumped(round) if round and not node.is_witness:
                    self.leaps += 1
                    assert session.replica is not None
                    session.replica = track.shared(round, session.replica.head)
                case End(code, reason):
                    if code is not Exit.OK and node.is_up:
                        self.fail(f"node {node.number} gave up with exit code {code.value}: {reason}")
                    node.has_finished = True
                    node.is_up = False
                    return
                case Applied() | Jumped() | Keep():
                    pass
        if sessions is not None:
            self._probe_if_wanted(node, sessions)

    def _probe_if_wanted(self, node: _Node, sessions: Sessions) -> None:
        wanted = sessions.next_probe()
        if wanted is None or node.is_probing:
            return
        node.is_probing = True
        agent, round, _ = wanted

        def probed() -> None:
            node.is_probing = False
            if not node.is_up or node.sessions is not sessions:
                return
            num = self.manifest.moves.projections if node.moves else self.manifest.probe.directions
            drawn = np.frombuffer(self.rng.randbytes(num), np.uint8)
            votes = self._usual if node.moves else self._expressible
            codes = votes[drawn.astype(np.int64) % votes.size]
            self._node_does(node, sessions.on_probed(agent, round, codes, 4.0, self.now))

        self.at(node.probe_s * (0.8 + 0.4 * self.rng.random()), probed)

    def _send_up(self, node: _Node, agent: int, message: FromMember) -> None:
        if self._is_lost():
            return
        session, key, generation = self._session_id(node), node.key, self.generation

        def arrive() -> None:
            if self.generation == generation:
                self.carry_out(self.conductors.on_message(session, key, agent, message, self.now))

        node.up_at = self.at(self._latency(), arrive, node.up_at)


def virtual(manifest: Manifest, scenario: Scenario) -> Manifest:
    """The manifest of a simulated run: that of a real one, with few parameters and the scenario's rounds."""
    replace = msgspec.structs.replace
    nonce = f"{scenario.seed & (2**128 - 1):032x}"
    return validate(
        replace(
            manifest,
            run=replace(manifest.run, rounds=scenario.rounds, nonce=nonce, signer=""),
            schedule=replace(manifest.schedule, warm_up=min(manifest.schedule.warm_up, scenario.rounds - 1)),
            adapter=replace(manifest.adapter, size=_SIZE),
            audit=Audits(),
        )
    )


def simulate(
    manifest: Manifest, scenario: Scenario, progress: Callable[[int, int], None]
) -> SimulationResult:
    """Run a scenario to its end and check every promise.

    Args:
        manifest: of the run; its adapter should be small, its rounds those of the scenario.
        scenario: what happens.
        progress: called with (rounds done, rounds in all).

    Raises:
        SimulationError: replicas differ, a report counted twice, a node was refused or never learned that the run is
            over, or the run got stuck.
    """
    world = _World(manifest, scenario, progress)
    world.populate()
    world.run()
    if not world.conductors.is_over:
        world.fail(f"nothing can happen any more at round {min(each.round for each in world.conductors)}")
    for track, conductor in zip(world.tracks, world.conductors, strict=True):
        track.check(conductor.replica)
    for node in world.at_the_end:
        assert node.sessions is not None
        if not node.has_finished:
            world.fail(f"node {node.number} was left waiting for the end, {node.sessions.stage.value}")
        for agent, session in node.sessions.by_agent.items():
            assert session.replica is not None
            if not world.tracks[agent].is_final(session.replica):
                world.fail(f"node {node.number} differs from the replay at the end")
    times = sorted(time for track in world.tracks for time in track.round_times)
    lost_in = world.mass_lost_in
    return SimulationResult(
        seed=scenario.seed,
        agents=len(world.tracks),
        rounds=len(world.tracks[0].frames),
        virtual_s=world.now,
        reports_counted=world.counted,
        reports_late=world.late,
        joins=world.joins,
        leaves=world.leaves,
        frames_lost=world.lost,
        coordinator_kills=world.kills,
        longest_round_s=times[-1],
        median_round_s=times[len(times) // 2],
        deadline_at_mass_loss_s=world.mass_deadline,
        round_after_mass_loss_s=world.tracks[0].round_times[lost_in] if lost_in is not None else None,
        leaps=world.leaps,
        nodes_at_the_end=len(world.at_the_end),
        digest=world.tracks[0].truth.digest().hex(),
    )
