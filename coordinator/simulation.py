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

from coordinator.conductor import Conductor, history_slice
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
from coordinator.ledger import num_codes
from coordinator.membership import FAREWELL_S, FLOW_WINDOW, Member
from coordinator.roster import Enrolment, Roster
from coordinator.snapshots import KEPT_NEWEST, Stored, offer
from transport.exits import Exit
from transport.messages import (
    PIECE_BYTES,
    FromCoordinator,
    FromNode,
    Piece,
    WireError,
    decode_from_coordinator,
)
from transport.session import Applied, End, Jumped, Keep, Open, Session, StartOver, Transmit
from transport.session import Effect as SessionEffect
from zo.commit import COMMIT_TAG, Commit, Entry, chain_digest, decode_entry
from zo.manifest import Manifest, validate
from zo.replica import Replica
from zo.snapshot import content_address, encode_snapshot
from zo.steps import Scale, step_rule
from zo.weights import zeros

_RECONNECT_S: Final = 0.5
_TICK_S: Final = 1.0
_SNAPSHOT_ROUNDS: Final = 16
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
    rounds: int
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


class _SharedReplica(Replica):
    """A replica that looks the next state up instead of computing it; equal chains have equal weights (law 1)."""

    def __init__(self, world: "_World", round: int, head: bytes) -> None:
        self._world = world
        self.round = round
        self.head = head
        self.weights = world.no_weights

    def apply(self, entry: object, frame: bytes | None = None, history: object = None) -> None:
        """Step along the chain; a commit that does not follow is refused as by a real replica."""
        assert isinstance(entry, Commit)
        self._check_follows(entry)
        self.head = self._world.head_of(entry)
        self.round += 1

    def digest(self) -> bytes:
        """What a real replica at this point of the chain has."""
        return self._world.digest_at_head(self.round, self.head)


@dataclass
class _Node:
    number: int
    key: bytes
    probe_s: float
    is_witness: bool
    session: Session | None = None
    connection: int = 0
    """Counts connections: what was sent over an older one never arrives."""
    up_at: float = 0.0
    """When the last frame that it sent arrives: those of one connection stay in order, as TCP keeps them."""
    down_at: float = 0.0
    """The same of the last frame that was sent to it."""
    is_up: bool = False
    is_probing: bool = False
    saved: tuple[Manifest, Replica] | None = None
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
        self.no_weights = zeros(0)
        self.frames: list[bytes] = []
        self.heads: list[bytes] = [self.manifest.run_id]
        self.checkpoints: dict[int, tuple[bytes, Scale]] = {}
        self.members: dict[int, tuple[bytes, str]] = {}
        self.left: set[int] = set()
        """Members whose last noted word is that they leave."""
        self.bytes_before: list[int] = [0]
        self.codes_before: list[int] = [0]
        self.snapshot: Stored | None = None
        self.snapshots: dict[bytes, bytes] = {}
        """By content, the newest few."""
        self.is_calm = False
        self.is_served = True
        self.at_the_end: list[_Node] = []
        """Who was up when the last round was done."""
        self.truth = Replica(self.manifest, zeros(self.manifest.adapter.size))
        self.digests: dict[int, bytes] = {0: self.truth.digest()}
        self._entry_by_frame: dict[bytes, Entry] = {}
        self._head_by_commit: dict[int, tuple[Commit, bytes]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.nodes: list[_Node] = []
        self.node_by_session: dict[bytes, _Node] = {}
        self.generation = 0
        self.lost = self.joins = self.leaves = self.kills = self.counted = self.late = self.leaps = 0
        self.round_opened_at = 0.0
        self.round_times: list[float] = []
        self.mass_lost_in: int | None = None
        self.mass_deadline: float | None = None
        self._wake_at: float | None = None
        """When the conductor's deadline is due."""
        self.conductor = self._start_conductor()

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
                self.carry_out(self.conductor.on_tick(self.now))
            if self.now > limit:
                self.fail(f"round {self.conductor.round} did not close within {limit:.0f} virtual seconds")

    def fail(self, what: str) -> None:
        raise SimulationError(
            f"{what} (seed {self.scenario.seed}: `simulate --seed {self.scenario.seed}` shows it again)"
        )

    # ---- the coordinator ------------------------------------------------------------------------------------------

    def _start_conductor(self) -> Conductor:
        scale = step_rule(self.manifest).start()
        known = max(self.checkpoints, default=0)
        if known:
            scale = self.checkpoints[known][1]
        rule = step_rule(self.manifest)
        for number in range(known, len(self.frames)):
            entry = decode_entry(self.frames[number])
            assert isinstance(entry, Commit)
            _, scale = rule.advance(scale, number, np.frombuffer(entry.codes, np.int8))
        replica = Replica(self.manifest, self.truth.weights, self.truth.round, self.truth.head)
        members = [
            Member(node=node, key=key, name=name, has_left=node in self.left)
            for node, (key, name) in self.members.items()
        ]
        return Conductor(
            self.manifest,
            ServiceConfig(quorum=max(1, self.scenario.nodes // 50), capacity=4096),
            replica,
            scale,
            members,
            Roster(Enrolment(node, key, name) for node, (key, name) in self.members.items()),
            self.heads.__getitem__,
            lambda round: self.checkpoints[round][0] if round in self.checkpoints else None,
            lambda first, last: history_slice(self.frames[first : min(last, first + FLOW_WINDOW)]),
            lambda round: offer(self.snapshot, round, None, self._cost_since),
            lambda first, last: [],
            self.now,
        )

    def _cost_since(self, first: int) -> tuple[int, int]:
        return (
            self.bytes_before[-1] - self.bytes_before[first],
            self.codes_before[-1] - self.codes_before[first],
        )

    def kill_coordinator(self) -> None:
        """SIGKILL and a restart: memory is gone, the ledger is not."""
        self.kills += 1
        self.generation += 1
        self.conductor = self._start_conductor()
        self._wake_at = None
        self._break_connections(_RECONNECT_S)

    def _break_connections(self, mean_s: float) -> None:
        """All at once; everybody is back after half to one and a half times `mean_s`."""
        for node in self.nodes:
            if node.is_up and node.session is not None:
                self.node_by_session.pop(self._session_id(node), None)
                node.connection += 1
                node.session.on_link_down()
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
        self.carry_out(self.conductor.on_tick(self.now))
        self.is_served = bool(self.conductor.owed_the_end(self.now))
        self.at(_TICK_S, self._tick_conductor)

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._do(effect)
        for effect in self.conductor.settle():
            self._do(effect)
        self._wake_at = self.conductor.wake_at()
        if self._wake_at is not None and self.conductor.round == self.mass_lost_in:
            self.mass_deadline = self._wake_at - self.round_opened_at

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send(session, _, frame):
                node = self.node_by_session.get(session)
                if node is not None:
                    self._deliver(node, frame)
            case Persist(commit, frame):
                self._persist(commit, frame)
            case PersistCheckpoint(round, digest, scale):
                self.checkpoints[round] = digest, scale
                if digest != self.digests[round]:
                    self.fail(f"the coordinator's replica differs from a replay at round {round}")
            case Enrol(node_number, key, name):
                self.members[node_number] = key, name
            case Quarantine(node_number):
                self.fail(f"node {node_number} was quarantined, and nobody is faulty")
            case SendPiece(session, content, offset):
                data = self.snapshots.get(content, b"")
                piece = Piece(content, offset, len(data), data[offset : offset + PIECE_BYTES])
                self._do(send(session, piece))
            case Note(kind, node_number, text):
                if kind in ("diverged", "misfit"):
                    self.fail(text)
                if node_number is not None and kind in ("joined", "left"):
                    (self.left.add if kind == "left" else self.left.discard)(node_number)

    def _persist(self, commit: Commit, frame: bytes) -> None:
        self.frames.append(frame)
        self.truth.apply(commit, frame)
        self.heads.append(self.truth.head)
        if (
            self.truth.round % self.manifest.parity.digest_every == 0
            or self.truth.round == self.scenario.rounds
        ):
            self.digests[self.truth.round] = self.truth.digest()
        self.bytes_before.append(self.bytes_before[-1] + len(frame))
        self.codes_before.append(self.codes_before[-1] + num_codes(commit))
        if self.truth.round % _SNAPSHOT_ROUNDS == 0:
            self._save_snapshot()
        self.counted += num_codes(commit) // self.manifest.probe.directions
        self.late += len(commit.late)
        took = self.now - self.round_opened_at
        self.round_times.append(took)
        self.round_opened_at = self.now
        self.progress(self.truth.round, self.scenario.rounds)
        scenario = self.scenario
        if self.truth.round == scenario.rounds:
            self.at(0.0, self._calm_down)  # once this commit is sent
            return
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

    def _save_snapshot(self) -> None:
        data = encode_snapshot(self.truth, self.manifest)
        self.snapshot = Stored(self.truth.round, content_address(data), len(data))
        self.snapshots[self.snapshot.content] = data
        if len(self.snapshots) > KEPT_NEWEST:
            del self.snapshots[next(iter(self.snapshots))]

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
            )
            self.nodes.append(node)
            self.at(self.rng.random() * self.scenario.probe_s, self._boot(node))

    def _boot(self, node: _Node) -> Callable[[], None]:
        def boot() -> None:
            if node.is_up or self.is_calm:
                return
            node.is_up = True
            node.is_probing = False
            node.connection += 1
            self.joins += 1
            base, tokenizer = (
                bytes.fromhex(x) for x in (self.manifest.base.digest, self.manifest.base.tokenizer_digest)
            )
            node.session = Session(
                self.manifest.run_id,
                base,
                tokenizer,
                f"n{node.number}",
                node.saved,
                decode=self._decode_entry,
            )
            self._connect(node)
            self.at(_TICK_S, self._ticking(node, node.session))

        return boot

    def _reconnection(self, node: _Node, connection: int) -> Callable[[], None]:
        def reconnect() -> None:
            if node.is_up and node.connection == connection:
                self._connect(node)

        return reconnect

    def _connect(self, node: _Node) -> None:
        assert node.session is not None
        self.node_by_session[self._session_id(node)] = node
        self._node_does(node, node.session.on_link_up())

    def _session_id(self, node: _Node) -> bytes:
        return node.number.to_bytes(4, "big") + node.connection.to_bytes(4, "big")

    def _ticking(self, node: _Node, session: Session) -> Callable[[], None]:
        def tick() -> None:
            if node.is_up and node.session is session:
                self._node_does(node, session.on_tick(self.now))
                self.at(_TICK_S * 5, tick)

        return tick

    def _churn(self) -> None:
        count = self.scenario.churn * self.scenario.nodes / 2
        for _ in range(int(count) + (self.rng.random() < count % 1)):
            node = self.rng.choice(self.nodes)
            if node.is_up:
                if self.rng.random() < 0.5 and node.session is not None:
                    self._node_does(node, node.session.leave())  # in good order
                self._vanish(node)
            else:
                self.at(self.rng.random() * self.scenario.probe_s, self._boot(node))

    def _vanish(self, node: _Node) -> None:
        if not node.is_up:
            return
        self.leaves += 1
        node.is_up = False
        self.node_by_session.pop(self._session_id(node), None)
        session, node.session = node.session, None
        if session is not None and session.replica is not None:
            # What it saved is from some time ago, or lost.
            node.saved = (self.manifest, session.replica) if self.rng.random() < 0.7 else None
            if node.is_witness and node.saved is not None:
                replica = session.replica
                node.saved = (
                    self.manifest,
                    Replica(self.manifest, replica.weights, replica.round, replica.head),
                )

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
            if node.is_up and node.connection == connection and node.session is not None:
                self._node_does(node, node.session.on_message(self._decode(frame), self.now))

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
        session = node.session
        for effect in effects:
            if session is None:
                return
            match effect:
                case Transmit(message):
                    self._send_up(node, message)
                case Open():
                    if session.replica is None:
                        self._node_does(node, session.opened(self._fresh_replica(node), self.now))
                case StartOver(reason):
                    self.fail(f"node {node.number} was told to start over: {reason}")
                case Jumped(round) if round and not node.is_witness:
                    self.leaps += 1
                    assert session.replica is not None
                    session.replica = _SharedReplica(self, round, session.replica.head)
                case End(code, reason):
                    if code is not Exit.OK and node.is_up:
                        self.fail(f"node {node.number} gave up with exit code {code.value}: {reason}")
                    node.has_finished = True
                    node.is_up = False
                    return
                case Applied() | Jumped() | Keep():
                    pass
        if session is not None:
            self._probe_if_wanted(node, session)

    def _fresh_replica(self, node: _Node) -> Replica:
        if node.is_witness:
            return Replica(self.manifest, zeros(self.manifest.adapter.size))
        return _SharedReplica(self, 0, self.manifest.run_id)

    def _probe_if_wanted(self, node: _Node, session: Session) -> None:
        wanted = session.next_probe()
        if wanted is None or node.is_probing:
            return
        node.is_probing = True

        def probed() -> None:
            node.is_probing = False
            if not node.is_up or node.session is not session:
                return
            codes = np.frombuffer(self.rng.randbytes(self.manifest.probe.directions), np.int8)
            self._node_does(node, session.on_probed(wanted[0], codes, 4.0, self.now))

        self.at(node.probe_s * (0.8 + 0.4 * self.rng.random()), probed)

    def _send_up(self, node: _Node, message: FromNode) -> None:
        if self._is_lost():
            return
        session, key, generation = self._session_id(node), node.key, self.generation

        def arrive() -> None:
            if self.generation == generation:
                self.carry_out(self.conductor.on_message(session, key, message, self.now))

        node.up_at = self.at(self._latency(), arrive, node.up_at)

    # ---- shared weights ---------------------------------------------------------------------------------------------

    def head_of(self, commit: Commit) -> bytes:
        known = self._head_by_commit.get(commit.round)
        if known is None or known[0] is not commit:
            known = commit, chain_digest(commit.encode())
            self._head_by_commit[commit.round] = known
        return known[1]

    def digest_at_head(self, round: int, head: bytes) -> bytes:
        if self.heads[round] != head:
            self.fail(f"a node at round {round} is on another chain")
        return self.digests.get(round, bytes(16))


def virtual(manifest: Manifest, scenario: Scenario) -> Manifest:
    """The manifest of a simulated run: that of a real one, with few parameters and the scenario's rounds."""
    replace = msgspec.structs.replace
    nonce = f"{scenario.seed & (2**128 - 1):032x}"
    return validate(
        replace(
            manifest,
            run=replace(manifest.run, rounds=scenario.rounds, nonce=nonce),
            adapter=replace(manifest.adapter, size=_SIZE),
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
    if not world.conductor.is_over:
        world.fail(f"nothing can happen any more at round {world.conductor.round}")
    _check_ledger(world)
    for node in world.at_the_end:
        session = node.session
        assert session is not None
        if not node.has_finished:
            world.fail(f"node {node.number} was left waiting for the end, {session.stage.value}")
        assert session.replica is not None
        if session.replica.digest() != world.digests[scenario.rounds]:
            world.fail(f"node {node.number} differs from the replay at the end")
    times = sorted(world.round_times)
    lost_in = world.mass_lost_in
    return SimulationResult(
        seed=scenario.seed,
        rounds=len(world.frames),
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
        round_after_mass_loss_s=world.round_times[lost_in] if lost_in is not None else None,
        leaps=world.leaps,
        nodes_at_the_end=len(world.at_the_end),
        digest=world.truth.digest().hex(),
    )


def _check_ledger(world: _World) -> None:
    """No (node, sample) may have been applied twice, and a fault-free replay must give the same weights."""
    replay = Replica(world.manifest, zeros(world.manifest.adapter.size))
    seen: set[tuple[int, int]] = set()
    for frame in world.frames:
        entry = decode_entry(frame)
        assert isinstance(entry, Commit)
        for node in entry.participants:
            name = node, entry.round - (node in entry.late)
            if name in seen:
                world.fail(f"the report of node {name[0]} for round {name[1]} was applied twice")
            seen.add(name)
        replay.apply(entry, frame)
    if replay.digest() != world.conductor.replica.digest():
        world.fail("a replay of the ledger differs from the coordinator's replica")
