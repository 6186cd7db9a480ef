"""Pipelined rounds: what the conductor makes of reports that come a round early, and what a run gains by them.

Nodes and coordinator are real, links are exact delays, and time is virtual: how long a round takes can be worked out.
"""

import heapq
from itertools import count

import msgspec
import numpy as np
import pytest

from benchmarks.soak_node import LogisticTrainer
from coordinator.config import ServiceConfig
from coordinator.invitations import REVOKED
from coordinator.membership import Presence
from coordinator.simulation import Scenario, simulate, virtual
from transport.exits import Exit
from transport.messages import (
    PROTOCOL_VERSION,
    Answer,
    Commit,
    Finished,
    Hello,
    Report,
    Welcome,
    decode_from_coordinator,
    decode_from_node,
    encode,
)
from transport.session import End, Open, Session, StartOver, Transmit
from zo.replica import Replica
from zo.weights import zeros

UNCAPPED = ServiceConfig(quorum=2, max_share=1000)


# ---- the conductor, by hand -----------------------------------------------------------------------------------------


def key_of(node):
    return node.to_bytes(32, "big")


class Run:
    """A pipelined run and its nodes, who say what a test has them say."""

    def __init__(self, coordinator, nodes):
        self.coordinator = coordinator
        for node in range(nodes):
            self.hello(node)

    def __getattr__(self, name):
        return getattr(self.coordinator, name)

    def hello(self, node, round=0, estimator=""):
        manifest, replica = self.manifest, self.replay(round)
        digests = bytes.fromhex(manifest.base.digest), bytes.fromhex(manifest.base.tokenizer_digest)
        hello = Hello(PROTOCOL_VERSION, manifest.run_id, *digests, round, replica.head, f"n{node}", estimator)
        return self.coordinator.message(b"%d" % node, key_of(node), hello)

    def report(self, node, round, codes=b"\x10\xf0"):
        return self.coordinator.message(b"%d" % node, key_of(node), Report(round % 256, codes))

    def rounds(self):
        return len(self.frames)


@pytest.fixture
def start(make_manifest, virtual_coordinator):
    def make(nodes, *, quorum=2, **manifest):
        manifest = make_manifest(**{"pipeline": 1, **manifest})
        return Run(virtual_coordinator(manifest, ServiceConfig(quorum=quorum)), nodes)

    return make


def test_an_early_report_counts_when_its_round_opens(start):
    run = start(2)
    run.report(0, 0)
    run.report(0, 1, b"\x11\xef")
    assert run.rounds() == 0, "one of two for round 0, and none of the other for round 1"
    run.report(1, 0)
    assert run.rounds() == 1
    assert run.conductor.wake_at() is None, "of round 1 a quorum is missing"
    run.report(1, 1, b"\x12\xee")
    assert [commit.participants for commit in run.commits] == [(0, 1), (0, 1)]
    assert run.commits[1].codes == b"\x11\xef\x12\xee"


def test_a_round_for_which_all_have_reported_closes_once_the_commit_before_has_left(start):
    run = start(2)
    run.coordinator.now = 7.0
    for node, round in ((0, 0), (0, 1), (1, 1), (1, 0)):
        run.report(node, round)
    assert run.rounds() == 1
    assert run.conductor.wake_at() == 7.0, "at once"
    run.tick(7.0)
    assert run.rounds() == 2
    assert [m.round for to, m in run.outbox if to == b"1" and isinstance(m, Commit)] == [0, 1]


def test_the_first_early_report_stands(start):
    run = start(2)
    for codes in (b"\x01\x01", b"\x02\x02"):
        run.report(0, 1, codes)
    for node, round in ((0, 0), (1, 0), (1, 1)):
        run.report(node, round)
    assert run.commits[1].codes[:2] == b"\x01\x01"


@pytest.mark.attack
def test_nobody_reports_for_a_round_after_the_next(start):
    run = start(2)
    for _ in range(50):
        run.report(0, 1)
    assert len(run.conductor._round.early_by_node) == 1
    for round in (2, 3, 130, 255):
        assert run.report(0, round) == []
    for round in range(2):
        for node in range(2):
            run.report(node, round)
    assert run.rounds() == 2
    run.report(1, 2)
    assert run.rounds() == 2, "of node 0 there is nothing for round 2"


def test_without_a_pipeline_nothing_is_early(start):
    run = start(2, pipeline=0)
    run.report(0, 0)
    run.report(0, 1)
    run.report(1, 0)
    run.report(1, 1)
    assert run.rounds() == 1


def test_a_report_proves_no_more_commits_than_it_takes(start):
    run = start(2)
    for round in range(3):
        for node in range(2):
            run.report(node, round)
    assert [run.conductor.members[node].acknowledged for node in range(2)] == [1, 1]
    run.report(0, 3)
    run.report(0, 4)
    assert run.conductor.members[0].acknowledged == 3


@pytest.mark.parametrize("before", [250, 300])
def test_rounds_modulo_256_name_one_round_where_the_window_is_full(start, before):
    """What a node has acknowledged may be 128 rounds ago, and what it reports a round ahead of all that it was sent."""
    run = start(1, quorum=1, rounds=1000)
    member = run.conductor.members[0]
    member.acknowledged, member.cursor = before, before + 128
    for round in range(before, before + 130):
        assert member.resolve(round % 256, 1) == round
    assert member.resolve((before + 130) % 256, 1) is None
    assert member.resolve((before - 1) % 256, 1) is None


def test_who_is_shut_out_counts_neither_for_this_round_nor_for_the_next(start):
    run = start(3)
    for node in (0, 1):
        run.report(node, 1)
    run.report(0, 0)
    run.carry_out(run.conductor.on_shut_out(key_of(0), REVOKED, 0.0))
    for round in range(2):
        for node in (1, 2):
            run.report(node, round)
    assert [commit.participants for commit in run.commits] == [(1, 2), (1, 2)]


def test_rounds_wait_for_who_is_late_with_the_next_one_and_go_on_without_who_is_dead(start):
    run = start(2, quorum=1)
    for round in range(8):
        run.coordinator.now += 1.0
        for node in range(2):
            run.report(node, round)
    assert run.rounds() == 8
    run.coordinator.now += 1.0
    run.report(0, 8)
    run.report(0, 9)
    assert run.rounds() == 8, "it waits for node 1"
    opened = run.now - 1.0
    run.tick(run.conductor.wake_at())
    assert run.now > opened + 1.0
    assert run.commits[8].participants == (0,)
    assert run.conductor.members[1].presence is Presence.SILENT
    run.tick(run.now)
    assert run.commits[9].participants == (0,), "nobody waits for it again"


def test_the_time_to_report_is_counted_from_when_a_node_could_begin(start):
    """Round r + 1 is asked for by the commit that opens round r: two rounds in flight, each of them takes 6 s."""
    run = start(1, quorum=1)
    for round in range(12):
        run.coordinator.now = 3.0 * (round + 1)
        run.report(0, round)
        assert run.rounds() == round + 1
    latency = run.conductor.members[0].latency
    assert latency.mean_s == pytest.approx(6.0, abs=0.7)


def test_who_joins_or_comes_back_is_told_both_exponents(start):
    run = start(2)
    (welcome,) = run.hello(0)
    assert welcome.exponent == (-4, -4), "those of the beginning"
    for codes in (b"\x7f\x81", b"\x7f\x7f", b"\x01\x01"):  # far too large, and far too small
        for node in range(2):
            run.report(node, run.rounds(), codes)
    exponents = [commit.exponents[0] for commit in run.commits]
    assert len(set(exponents)) > 1
    run.coordinator.start()  # what was said is in the ledger
    (welcome,) = run.hello(0, round=3)
    assert welcome.exponent == (exponents[1], exponents[2])
    newcomer = next(m for m in run.hello(5) if isinstance(m, Welcome))
    assert newcomer.exponent == welcome.exponent


def test_a_node_that_moves_is_told_the_exponents_of_moves(start):
    run = start(1, projections=5)
    run.hello(1, estimator="moves")
    for round in range(3):
        run.report(0, round)
        run.report(1, round, bytes([2] * 5))
    moves = [commit.exponents[1] for commit in run.commits]
    assert moves[0] < -4, "they were small"
    welcome = next(m for m in run.hello(1, round=3, estimator="moves") if isinstance(m, Welcome))
    assert welcome.exponent == (moves[1], moves[2])


def test_after_a_restart_both_reports_are_sent_again_and_count(start):
    run = start(2)
    for round in range(3):
        for node in range(2):
            run.report(node, round)
    run.report(0, 3)
    run.report(0, 4)
    run.coordinator.start()
    for node in range(2):
        run.hello(node, round=3)
    for round in (3, 4):
        for node in range(2):
            run.report(node, round)
    assert [commit.participants for commit in run.commits[3:]] == [(0, 1), (0, 1)]


def test_the_last_round_has_none_after_it(start):
    run = start(2, rounds=3)
    for round in range(3):
        for node in range(2):
            run.report(node, round)
    assert run.conductor.is_over
    assert [m for to, m in run.outbox if to == b"0"][-1] == Finished(3, run.replay().digest())
    assert run.report(0, 3) == []
    run.tick(100.0)
    assert run.rounds() == 3


# ---- public audits --------------------------------------------------------------------------------------------------


@pytest.fixture
def audited(start):
    run = start(3, quorum=3, rows=("{}",), rounds=6)
    run.coordinator.audit_sample = lambda round: 1000 + round
    run.coordinator.start()
    for node in range(3):
        run.hello(node)
    return run


def answer(run, node, round, loss):
    message = Answer(round, np.array([loss, loss], "<f4").tobytes())
    run.coordinator.message(b"%d" % node, key_of(node), message)


def test_an_answer_is_judged_when_the_next_report_of_its_node_counts(audited):
    for round in (0, 1):
        for node in range(3):
            audited.report(node, round)
    audited.tick()
    assert audited.audits == [], "round 1 was reported for before its audit was asked for"
    for node in range(3):
        answer(audited, node, 1, 1.5)
        answer(audited, node, 2, 2.5)
    answer(audited, 0, 3, 9.0)  # nobody asked for that yet
    for node in (0, 1):
        audited.report(node, 2)
    assert audited.audits == []
    audited.report(2, 2)
    assert audited.audits == [dict.fromkeys(range(3), (1.5, 1.5))]
    for node in range(3):
        audited.report(node, 3)
    assert audited.audits[1] == dict.fromkeys(range(3), (2.5, 2.5))


@pytest.mark.attack
def test_who_reports_twice_and_does_not_answer_is_counted(audited):
    for round in (0, 1):
        for node in range(3):
            audited.report(node, round)
    audited.tick()
    for node in range(2):
        answer(audited, node, 1, 1.5)
    for node in range(3):
        audited.report(node, 2)
    assert audited.audits == [{0: (1.5, 1.5), 1: (1.5, 1.5), 2: None}]


def test_no_audit_is_asked_for_that_no_round_is_left_to_judge(audited):
    for round in range(6):
        for node in range(3):
            audited.report(node, round)
            answer(audited, node, round, 1.0)
    assert audited.conductor.is_over
    asked = [m.round for to, m in audited.outbox if to == b"0" and type(m).__name__ == "Audit"]
    assert asked == [1, 2, 3, 4]
    assert len(audited.audits) == 4


# ---- over a link that takes its time --------------------------------------------------------------------------------


class Node:
    """A node's process on a virtual machine: it probes one round at a time, and every probe takes as long."""

    def __init__(self, number, manifest):
        self.key, self.manifest = key_of(number), manifest
        self.trainer = LogisticTrainer(manifest, number + 1, lambda _: None)
        self.saved = None
        self.end = None
        self.connections = count()
        self.probed = []
        """(round, commits that it had, codes) of every probe."""
        self.boot()

    def boot(self):
        """Start, with what was saved."""
        digests = bytes.fromhex(self.manifest.base.digest), bytes.fromhex(self.manifest.base.tokenizer_digest)
        replica = None if self.saved is None else Replica(self.manifest, *self.saved)
        saved = None if replica is None else (self.manifest, replica)
        self.session = Session(self.manifest.run_id, *digests, "n", saved)
        self.connection = None
        self.is_probing = False

    def save(self):
        replica = self.session.replica
        self.saved = replica.weights.copy(), replica.round, replica.head


class Line:
    """A coordinator, and nodes at the far end of links with a delay and nothing else."""

    def __init__(self, coordinator, *, nodes=2, probe_s=0.1, round_trip_s=0.6):
        self.coordinator, self.manifest = coordinator, coordinator.manifest
        self.probe_s, self.one_way_s = probe_s, round_trip_s / 2
        self.events, self.sequence = [], count()
        self.commit_times = []
        self.nodes = [Node(number, self.manifest) for number in range(nodes)]
        for node in self.nodes:
            self.connect(node)

    @property
    def now(self):
        return self.coordinator.now

    def at(self, delay, action):
        heapq.heappush(self.events, (self.now + delay, next(self.sequence), action))

    def run(self, until=lambda: False):
        """Until the run is over for everybody, or something has come about."""
        while not until() and not all(node.end for node in self.nodes):
            wake_at = self.coordinator.conductor.wake_at()
            if wake_at is not None and (not self.events or wake_at < self.events[0][0]):
                self.coordinator.tick(max(wake_at, self.now))
            else:
                self.coordinator.now, _, action = heapq.heappop(self.events)
                action()
            self.pass_on()
            assert self.now < 1000

    def pass_on(self):
        """What the coordinator sent leaves now."""
        self.commit_times += [self.now] * (len(self.coordinator.frames) - len(self.commit_times))
        for session, message in self.coordinator.outbox:
            for node in self.nodes:
                if node.connection == session:
                    self.at(self.one_way_s, self.arrival(node, session, encode(message)))
        self.coordinator.outbox.clear()

    def arrival(self, node, connection, frame):
        def arrive():
            if node.connection == connection:
                self.do(node, node.session.on_message(decode_from_coordinator(frame), self.now))

        return arrive

    def do(self, node, effects):
        for effect in effects:
            match effect:
                case Transmit(message):
                    self.at(self.one_way_s, self.departure(node, node.connection, encode(message)))
                case Open():
                    if node.session.replica is None:
                        fresh = Replica(self.manifest, zeros(self.manifest.adapter.size))
                        self.do(node, node.session.opened(fresh, self.now))
                case StartOver(reason):
                    pytest.fail(reason)
                case End():
                    assert effect.code is Exit.OK, effect.reason
                    node.end = effect
        self.probe(node)

    def departure(self, node, connection, frame):
        def arrive():
            if connection is not None and node.connection in (connection, None):
                self.coordinator.message(connection, node.key, decode_from_node(frame))

        return arrive

    def probe(self, node):
        wanted, session = node.session.next_probe(), node.session
        if wanted is None or node.is_probing:
            return
        node.is_probing = True
        round, exponent = wanted
        weights, num_commits = session.replica.weights.copy(), session.replica.round

        def done():
            if node.session is session:
                node.is_probing = False
                codes = node.trainer.probe(weights, round, session.node, exponent).codes
                node.probed.append((round, num_commits, codes.tobytes()))
                self.do(node, session.on_probed(round, codes, 1.0, self.now))

        self.at(self.probe_s, done)

    # ---- faults ----

    def connect(self, node):
        node.connection = node.key[-1:] + b"/%d" % next(node.connections)
        self.do(node, node.session.on_link_up())

    def kill_node(self, node, away_s):
        """SIGKILL; it comes back from what it saved last."""
        node.connection = None
        node.boot()
        self.at(away_s, lambda: self.connect(node))

    def kill_coordinator(self, away_s):
        """SIGKILL and a restart: everything on the way is lost."""
        self.coordinator.outbox.clear()
        self.coordinator.start()
        for node in self.nodes:
            node.connection = None
            node.session.on_link_down()
            self.at(away_s, lambda node=node: self.connect(node))

    def check(self):
        """Everybody has the weights of a replay, and every code in the ledger was measured for its round."""
        truth = self.coordinator.replay()
        assert self.coordinator.conductor.replica.digest() == truth.digest()
        ahead = self.manifest.run.pipeline
        for number, node in enumerate(self.nodes):
            assert node.session.replica.digest() == truth.digest()
            assert all(round - ahead <= num_commits <= round for round, num_commits, _ in node.probed)
            said = {(round, codes) for round, _, codes in node.probed}
            for commit in self.coordinator.commits:
                if number in commit.participants:
                    place = 2 * commit.participants.index(number)
                    assert (commit.round, commit.codes[place : place + 2]) in said


@pytest.fixture
def line(make_manifest, virtual_coordinator):
    def make(pipeline, *, nodes=2, probe_s=0.1, round_trip_s=0.6, **manifest):
        manifest = make_manifest(**{"size": 40, "rounds": 60, "pipeline": pipeline, **manifest})
        coordinator = virtual_coordinator(manifest, UNCAPPED)
        return Line(coordinator, nodes=nodes, probe_s=probe_s, round_trip_s=round_trip_s)

    return make


@pytest.mark.parametrize(
    ("probe_s", "round_trip_s"), [(0.1, 0.6), (0.01, 0.6), (0.6, 0.6), (1.0, 0.6), (0.1, 0.0)]
)
def test_a_round_takes_what_the_schedule_says(line, probe_s, round_trip_s):
    """One after the other: a probe and a round trip. Pipelined: half of that, or a probe if this is longer."""
    per_round = {}
    for pipeline in (0, 1):
        run = line(pipeline, probe_s=probe_s, round_trip_s=round_trip_s)
        run.run()
        run.check()
        assert all(commit.participants == (0, 1) for commit in run.coordinator.commits)
        pairs = np.array(run.commit_times)
        per_round[pipeline] = (pairs[4::2] - pairs[2:-2:2]) / 2
    assert per_round[0] == pytest.approx(probe_s + round_trip_s)
    assert per_round[1] == pytest.approx(max(probe_s, (probe_s + round_trip_s) / 2))


def test_every_probe_is_at_weights_one_commit_old(line):
    run = line(1)
    run.run()
    for node in run.nodes:
        assert [round for round, *_ in node.probed] == list(range(60))
        assert all(num_commits == max(round - 1, 0) for round, num_commits, _ in node.probed)


def test_a_pipelined_run_learns_what_one_after_the_other_does_in_about_half_the_time(line):
    """The same rounds, each measured at weights that are one commit old."""
    losses, seconds = {}, {}
    for pipeline in (0, 1):
        run = line(pipeline, rounds=200, directions=4, step=0.02)
        start = np.zeros(40, np.float32)
        run.run()
        weights = run.coordinator.replay().weights.astype(np.float32) * np.float32(2.0**-28)
        trainers = [node.trainer for node in run.nodes]
        before, after = (np.mean([each.loss(at) for each in trainers]) for at in (start, weights))
        losses[pipeline], seconds[pipeline] = before - after, run.now
    assert losses[0] > 0.1
    assert losses[1] > 0.9 * losses[0]
    assert seconds[1] < 0.55 * seconds[0]


@pytest.mark.parametrize("moment", range(24))
def test_a_kill_of_a_node_and_of_the_coordinator_with_two_rounds_on_the_way(line, moment):
    """At every part of a round: before and after either report arrives, before and after either commit does."""
    run = line(1, nodes=3, digest_every=3)
    run.run(until=lambda: len(run.coordinator.frames) >= 7)
    run.nodes[0].save()
    run.run(until=lambda: len(run.coordinator.frames) >= 12)
    strike = run.now + moment * 0.03  # two rounds take 0.7 s
    run.at(strike - run.now, lambda: None)
    run.run(until=lambda: run.now >= strike)
    if moment % 2:
        run.kill_coordinator(0.2)
    run.kill_node(run.nodes[0], 0.5)
    run.run(until=lambda: len(run.coordinator.frames) >= 30)
    run.kill_coordinator(0.1 * (1 + moment % 3))
    run.run()
    run.check()
    assert len(run.coordinator.frames) == 60
    assert sum(commit.participants == (0, 1, 2) for commit in run.coordinator.commits) > 40


def test_who_joins_late_takes_part_in_both_rounds(line):
    run = line(1, nodes=3)
    late = run.nodes.pop()
    run.run(until=lambda: len(run.coordinator.frames) >= 20)
    run.nodes.append(late)
    late.boot()
    run.connect(late)
    run.run()
    run.check()
    rounds = [round for round, *_ in late.probed]
    assert rounds == list(range(rounds[0], 60)), "none is left out"
    assert run.coordinator.commits[-1].participants == (0, 1, 2)


def test_half_the_time_also_where_delays_vary(make_manifest):
    scenario = Scenario(
        nodes=16, rounds=60, churn=0.0, loss=0.0, slow=0.0, probe_s=0.1, latency_s=0.3, coordinator_kills=0
    )
    results = [
        simulate(
            virtual(make_manifest(directions=4, pipeline=pipeline), scenario),
            scenario,
            lambda done, total: None,
        )
        for pipeline in (0, 1)
    ]
    assert results[1].virtual_s < results[0].virtual_s
    assert results[1].median_round_s < 0.7 * results[0].median_round_s
    assert msgspec.structs.asdict(results[1])["reports_counted"] > 0.9 * results[0].reports_counted
