"""Conductor and sessions together over a network that loses, delays and breaks: law 1, 2 and 4 by the thousand.

The schedule is drawn from a seed. The network is as unkind as ZeroMQ over TCP can be: frames of one connection stay in
order, but a connection may break at any time and take what is on its way with it, a process may die between any two of
its effects, and everything is late. Every report is found in the ledger at most once, and every node ends with the
weights of a fault-free replay.
"""

import random
from collections import deque

import numpy as np
import pytest

from coordinator.config import ServiceConfig
from transport.exits import Exit
from transport.messages import Report, decode_from_coordinator, decode_from_node, encode
from transport.seals import Signer
from transport.session import Applied, End, Open, Session, Stage, StartOver, Transmit
from zo.commit import decode_entry
from zo.replica import Replica
from zo.weights import zeros

SIGNER = Signer(bytes(range(32))).public
"""Whose seals the virtual coordinator makes."""

UNCAPPED = ServiceConfig(max_share=1000)
"""What is committed is what was said, to the last bit."""


class ProcessDied(BaseException):
    """The coordinator's process is gone."""


class Node:
    """A node's process: a session, its connection, and a loss that is a few random numbers."""

    def __init__(self, number, manifest, rng):
        self.key = number.to_bytes(32, "big")
        self.manifest, self.rng = manifest, rng
        self.saved = None
        self.sent = {}
        """Round by round, every set of codes it ever reported."""
        self.probed = set()
        """(round, exponent, commits that it had) of every probe."""
        self.counted = []
        self.end = None
        self.num_connections = 0
        self.is_spoilt = False
        self.boot()

    def boot(self):
        base, tokenizer = (
            bytes.fromhex(d) for d in (self.manifest.base.digest, self.manifest.base.tokenizer_digest)
        )
        replica = None
        if self.saved is not None:
            weights, round, head = self.saved
            replica = Replica(self.manifest, weights, round, head)
        self.session = Session(
            self.manifest.run_id, base, tokenizer, "n", (self.manifest, replica) if replica else None
        )
        self.connection = None
        self.up, self.down = deque(), deque()

    def connect(self):
        self.num_connections += 1
        self.connection = self.key[-1:] + b"/%d" % self.num_connections
        self.up = deque()
        self.carry_out(self.session.on_link_up())

    def disconnect(self):
        self.connection = None
        self.up = deque()
        if self.rng.random() < 0.5:
            self.down.clear()  # else it had arrived already, and is read after the news that the connection broke
        self.session.on_link_down()

    def fresh(self):
        return Replica(self.manifest, zeros(self.manifest.adapter.size))

    def save(self):
        replica = self.session.replica
        if replica is not None:
            self.saved = replica.weights.copy(), replica.round, replica.head

    def carry_out(self, effects):
        for effect in effects:
            match effect:
                case Transmit(message):
                    if self.connection is not None:
                        self.up.append(encode(message))
                    if isinstance(message, Report):
                        self.sent.setdefault(message.round, set()).add(message.codes)
                case Open():
                    if self.session.replica is None:
                        self.carry_out(self.session.opened(self.fresh(), 0.0))
                case StartOver():
                    self.saved = None  # it may have been saved when it was wrong already
                    self.carry_out(self.session.opened(self.fresh(), 0.0))
                case Applied(commit, True, _):
                    self.counted.append(commit.round)
                case End():
                    self.end = effect

    def probe(self, now):
        wanted = self.session.next_probe()
        if wanted is not None:
            round, exponent = wanted
            self.probed.add((round, exponent, self.session.replica.round))
            codes = np.array([self.rng.choice((-128, *range(-60, 61))) for _ in range(2)], np.int8)
            self.carry_out(self.session.on_probed(round, codes, 1.0, now))


class Swarm:
    """A schedule of everything that can happen."""

    def __init__(self, seed, manifest, coordinator, num_nodes):
        self.rng = random.Random(seed)
        self.coordinator = coordinator
        self.manifest = manifest
        self.nodes = [Node(number, manifest, self.rng) for number in range(num_nodes)]
        self.now = 0.0
        self.num_restarts = 0

    def deliver_up(self, node, dies):
        frame = node.up.popleft()
        session = node.connection
        coordinator = self.coordinator
        coordinator.now = self.now
        effects = coordinator.conductor.on_message(session, node.key, decode_from_node(frame), self.now)
        self.carry_out(effects, dies)

    def carry_out(self, effects, dies=False):
        coordinator = self.coordinator
        last = self.rng.randrange(len(effects) + 1) if dies else len(effects)
        for effect in effects[:last]:
            coordinator.do(effect)
        if dies:
            raise ProcessDied
        coordinator.settle()
        self.pass_frames_on()

    def pass_frames_on(self):
        by_connection = {node.connection: node for node in self.nodes if node.connection is not None}
        gone = []
        for session, message in self.coordinator.outbox:
            node = by_connection.get(session)
            if node is None:
                gone.append(session)
            else:
                node.down.append(encode(message))
        self.coordinator.outbox.clear()
        for session in gone:
            self.carry_out(self.coordinator.conductor.on_unsent(session, self.now))

    def restart_coordinator(self):
        self.num_restarts += 1
        self.coordinator.outbox.clear()
        for node in self.nodes:
            if node.connection is not None:
                node.disconnect()
        self.coordinator.now = self.now
        self.coordinator.start()

    def step(self, faults=True):
        self.now += self.rng.expovariate(10)
        node = self.rng.choice(self.nodes)
        what = self.rng.random()
        if node.end is not None:
            assert node.end.code is Exit.OK, node.end.reason
            if faults and what < 0.1:  # a person joins again
                node.end = None
                node.boot()
            return
        try:
            if faults and what < 0.01:
                node.disconnect()
            elif faults and what < 0.02:
                node.save()
            elif faults and what < 0.03:  # killed, and started again from what it saved last
                node.boot()
            elif faults and what < 0.035 and node.session.stage is not Stage.ENDED:
                node.carry_out(node.session.leave())
                while node.up:
                    self.deliver_up(node, dies=False)
                node.save()
                node.boot()
            elif faults and what < 0.04:  # the coordinator gives it up: its queue is full
                if node.connection is not None:
                    self.carry_out(self.coordinator.conductor.on_unsent(node.connection, self.now))
            elif faults and what < 0.045:
                self.restart_coordinator()
            elif faults and what < 0.0455 and node.session.replica is not None and not node.is_spoilt:
                node.is_spoilt = True  # once: who differs again is shut out
                node.session.replica.weights[self.rng.randrange(40)] ^= 1 << 20  # a bit flips in its memory
            elif node.connection is None:
                if what > 0.7:
                    node.connect()
            elif what < 0.35:
                if node.up:
                    self.deliver_up(node, dies=faults and self.rng.random() < 0.01)
            elif what < 0.75:
                for _ in range(self.rng.randrange(4)):
                    if node.down:
                        message = decode_from_coordinator(node.down.popleft())
                        node.carry_out(node.session.on_message(message, self.now))
            elif what < 0.9:
                node.probe(self.now)
            elif what < 0.95:
                node.carry_out(node.session.on_tick(self.now))
            else:
                self.carry_out(self.coordinator.conductor.on_tick(self.now))
        except ProcessDied:
            self.restart_coordinator()

    def check_ledger(self):
        number_by_key = {key: number for number, (key, _) in self.coordinator.enrolled.items()}
        by_number = {number_by_key[node.key]: node for node in self.nodes if node.key in number_by_key}
        for commit in (decode_entry(frame) for frame in self.coordinator.frames):
            for index, number in enumerate(commit.participants):
                codes = commit.codes[2 * index : 2 * index + 2]
                assert codes in by_number[number].sent.get(commit.round, ()), (
                    "nobody said that, or for another round"
                )

    def check_probes(self):
        """The unit of a round's codes follows from the ledger alone, and weights are as old as the manifest allows."""
        ahead, first = self.manifest.run.pipeline, self.manifest.schedule.first_exponent
        exponents = [commit.exponents[0] for commit in self.coordinator.commits]
        for round, exponent, num_commits in set.union(*(node.probed for node in self.nodes)):
            assert round - ahead <= num_commits <= round
            assert exponent == (exponents[round - ahead - 1] if round > ahead else first)


@pytest.mark.parametrize("pipeline", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_all_replicas_equal_a_fault_free_replay_of_the_ledger(
    make_manifest, virtual_coordinator, seed, pipeline
):
    manifest = make_manifest(
        size=40, rounds=60, digest_every=3 if seed % 2 else 64, signer=SIGNER, pipeline=pipeline
    )
    swarm = Swarm(seed, manifest, virtual_coordinator(manifest, UNCAPPED), num_nodes=5)
    steps = 0
    while len(swarm.coordinator.frames) < 60:
        swarm.step()
        steps += 1
        assert steps < 60_000, f"seed {seed}: stuck at round {len(swarm.coordinator.frames)}"
    # the storm is over: everyone still there finds to the end by itself
    while not all(node.end for node in swarm.nodes):
        swarm.now += 0.05
        swarm.step(faults=False)
        steps += 1
        assert steps < 120_000, f"seed {seed}: {[(n.session.stage, n.connection) for n in swarm.nodes]}"
    truth = swarm.coordinator.replay()
    assert swarm.coordinator.conductor.replica.digest() == truth.digest()
    for node in swarm.nodes:
        assert node.session.replica.digest() == truth.digest()
        assert node.session.replica.head == truth.head
    swarm.check_ledger()
    swarm.check_probes()
    for round, (digest, _) in swarm.coordinator.checkpoints.items():
        replica = Replica(manifest, zeros(40))
        for frame in swarm.coordinator.frames[:round]:
            replica.apply(decode_entry(frame))
        assert replica.digest() == digest


def test_the_schedules_contain_what_they_are_meant_to(make_manifest, virtual_coordinator):
    manifest = make_manifest(size=40, rounds=60, digest_every=3, signer=SIGNER)
    seen = {"restarts": 0, "diverged": 0, "replaced": 0, "lost": 0, "left": 0, "missed": 0}
    for seed in range(6):
        swarm = Swarm(seed, manifest, virtual_coordinator(manifest, UNCAPPED), num_nodes=5)
        for _ in range(6000):
            swarm.step()
        seen["restarts"] += swarm.num_restarts
        for kind in seen.keys() - {"restarts"}:
            seen[kind] += len(swarm.coordinator.noted(kind))
    assert all(seen.values()), seen
