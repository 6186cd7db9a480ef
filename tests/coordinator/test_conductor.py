"""The conductor, driven by hand: a virtual clock, a ledger in memory, and law 4 checked with every effect."""

import heapq

import msgspec
import pytest

from coordinator.conductor import history_slice
from coordinator.config import ServiceConfig
from coordinator.effects import Persist, Send, SendPiece
from coordinator.membership import FAREWELL_S, FLOW_WINDOW, Presence
from transport.messages import (
    HISTORY_BYTES,
    PROTOCOL_VERSION,
    Commit,
    Fetch,
    Finished,
    Follow,
    Hello,
    History,
    Identify,
    Leave,
    Offer,
    Progress,
    Refuse,
    Report,
    Resync,
    Trace,
    Welcome,
)
from zo.commit import decode_entry
from zo.directions import GROUP_0, SHARED
from zo.packing import codes_of, unpack
from zo.weights import WeightsOverflow


def key_of(node: int) -> bytes:
    return node.to_bytes(32, "big")


def session_of(node: int) -> bytes:
    return b"session %d" % node


class Run:
    """A virtual coordinator with the few words that tests say all the time."""

    def __init__(self, coordinator):
        self.coordinator = coordinator
        self.manifest = coordinator.manifest

    def __getattr__(self, name):
        return getattr(self.coordinator, name)

    def hello(self, node, round=0, head=None, session=None, **change):
        head = head or (decode_entry(self.frames[round - 1]).digest() if round else self.manifest.run_id)
        base, tokenizer = (
            bytes.fromhex(d) for d in (self.manifest.base.digest, self.manifest.base.tokenizer_digest)
        )
        hello = Hello(PROTOCOL_VERSION, self.manifest.run_id, base, tokenizer, round, head, f"n{node}")
        hello = msgspec.structs.replace(hello, **change)
        return self.coordinator.message(session or session_of(node), key_of(node), hello)

    def report(self, node, round, codes=b"\x10\xf0", session=None):
        message = Report(round % 256, codes)
        return self.coordinator.message(session or session_of(node), key_of(node), message)

    def progress(self, node, round, digest, loss=None):
        return self.coordinator.message(session_of(node), key_of(node), Progress(round, digest, loss))

    def leave(self, node):
        return self.coordinator.message(session_of(node), key_of(node), Leave())

    def presence(self, node):
        return self.conductor.members[node].presence

    def play(self, nodes, rounds, seconds=1.0):
        """Everybody reports in every round."""
        for _ in range(rounds):
            self.coordinator.now += seconds
            for node in nodes:
                self.report(node, self.conductor.round)


@pytest.fixture
def start(make_manifest, virtual_coordinator):
    def make(nodes=0, *, quorum=1, patience=4.0, max_wait_s=60.0, capacity=1024, **manifest):
        config = ServiceConfig(quorum=quorum, patience=patience, max_wait_s=max_wait_s, capacity=capacity)
        run = Run(virtual_coordinator(make_manifest(**manifest), config))
        for node in range(nodes):
            run.hello(node)
        return run

    return make


# ---- joining ------------------------------------------------------------------------------------------------------


def test_the_first_hello_is_welcomed_with_number_manifest_round_and_exponent(start):
    run = start()
    (welcome,) = run.hello(7)
    assert welcome == Welcome(PROTOCOL_VERSION, 0, run.manifest.encode(), 0, -4, None)
    assert run.enrolled == {0: (key_of(7), "n7")}
    assert run.noted("joined") == ["node 0 (n7) joined at round 0, 0 behind"]


def test_numbers_are_given_in_order_and_kept(start):
    run = start(3)
    assert list(run.enrolled) == [0, 1, 2]
    run.leave(1)
    (welcome,) = run.hello(1)
    assert welcome.node == 1
    run.coordinator.start()
    assert [run.hello(node)[0].node for node in (2, 0, 1, 9)] == [2, 0, 1, 3]
    assert sorted(run.enrolled) == [0, 1, 2, 3]


def test_a_late_node_gets_the_history_and_then_each_commit(start):
    run = start(2)
    run.play([0, 1], 5)
    welcome, history = run.hello(2)
    assert (welcome.round, welcome.node) == (len(run.frames), 2)
    assert history == History(tuple(run.frames))
    before = len(run.frames)
    run.play([0, 1], 1)
    received = [message for session, message in run.outbox if session == session_of(2)][2:]
    assert [message.round for message in received] == list(range(before, len(run.frames)))


def test_a_node_that_comes_back_gets_only_what_it_missed(start):
    run = start(1)
    run.play([0], 6)
    run.leave(0)
    welcome, history = run.hello(0, round=4)
    assert welcome.round == 6
    assert history == History(tuple(run.frames[4:]))
    assert run.noted("joined")[-1] == "node 0 (n0) joined at round 6, 2 behind"


def test_history_is_sent_no_further_than_the_flow_window(start):
    run = start(1, rounds=1000)
    run.play([0], 300)
    welcome, *histories = run.hello(1)
    assert welcome.round == 300
    assert sum(len(history.frames) for history in histories) == FLOW_WINDOW
    # commits made meanwhile are not for it yet
    run.play([0], 1)
    assert not [m for s, m in run.outbox if s == session_of(1) and isinstance(m, Commit)]
    # an acknowledgement opens the window: of 64 more, then of the rest
    (history,) = run.progress(1, 64, run.checkpoints[64][0])
    assert decode_entry(history.frames[0]).round == FLOW_WINDOW
    assert len(history.frames) == 64
    (history,) = run.progress(1, 192, run.checkpoints[192][0])
    assert decode_entry(history.frames[-1]).round == 300
    run.play([0], 1)
    assert run.outbox[-1] == (session_of(1), decode_entry(run.frames[-1]))


def test_no_acknowledgement_of_what_was_never_sent(start):
    run = start(1, rounds=1000)
    run.play([0], 300)
    run.hello(1)
    run.progress(1, 2**40, bytes(16))
    assert run.conductor.members[1].acknowledged == FLOW_WINDOW
    assert run.conductor.members[1].cursor <= 2 * FLOW_WINDOW


def test_history_comes_in_slices_that_fit_a_message():
    frames = [bytes(HISTORY_BYTES // 3)] * 5
    assert len(history_slice(frames)) == 3
    assert history_slice([bytes(3 * HISTORY_BYTES), b""]) == [bytes(3 * HISTORY_BYTES)]
    assert history_slice([]) == []


def test_long_histories_come_in_several_messages(start):
    run = start(1, directions=1000, rounds=200)
    for number in range(100):
        run.report(0, number, codes=bytes(999) + b"\x01")
    _, *histories = run.hello(1)
    assert len(histories) == 2
    assert [frame for history in histories for frame in history.frames] == run.frames


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "change", "reason"),
    [
        ("protocol", {"protocol": 9}, "the coordinator speaks protocol 1, this node 9; update the older one"),
        ("run", {"run_id": bytes(16)}, f"the ticket is for run {'00' * 16}, this coordinator serves"),
        (
            "base",
            {"base": bytes(16)},
            f"this node's base has digest {'00' * 16}, the run's base 'none' has b0b0",
        ),
        (
            "tokenizer",
            {"tokenizer": bytes(16)},
            f"this node's tokenizer has digest {'00' * 16}, the run's has 7070",
        ),
        (
            "estimator",
            {"estimator": "magic"},
            "this node measures by 'magic'; this run allows two-sided, one-sided, forward, backward",
        ),
        (
            "fork",
            {"round": 3, "head": bytes(16)},
            "state at round 3 is not part of this ledger, which is at round 0",
        ),
        ("fork", {"head": bytes(16)}, "state at round 0 is not part of this ledger"),
        ("fork", {"round": 2**40, "head": bytes(16)}, "is not part of this ledger"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused_with_the_reason(start, cause, change, reason):
    run = start()
    (refusal,) = run.hello(0, **change)
    assert isinstance(refusal, Refuse)
    assert refusal.cause == cause
    assert reason in refusal.reason
    assert run.noted("refused") == [f"n0: {refusal.reason}"]
    assert not run.enrolled
    assert not run.conductor.members


def test_what_a_node_measures_by_is_known_and_what_the_run_forbids_is_refused(start):
    run = start(estimators=("two-sided", "backward"))
    run.hello(0, estimator="backward")
    run.hello(1)
    assert [run.conductor.members[node].estimator for node in (0, 1)] == ["backward", ""]
    (refusal,) = run.hello(2, estimator="forward")
    assert refusal.cause == "estimator"
    assert "allows two-sided, backward: choose one of them with --estimator" in refusal.reason


def test_a_full_run_refuses_new_nodes_and_welcomes_old_ones(start):
    run = start(2, capacity=2)
    (refusal,) = run.hello(2)
    assert refusal == Refuse("full", "the run has 2 nodes, its capacity is 2")
    run.leave(1)
    (welcome,) = run.hello(1)
    assert isinstance(welcome, Welcome)


def test_another_process_with_the_same_key_replaces_the_first(start):
    run = start(1)
    (welcome,) = run.hello(0, session=b"other")
    assert welcome.node == 0
    refused = [m for s, m in run.outbox if s == session_of(0) and isinstance(m, Refuse)]
    assert [refusal.cause for refusal in refused] == ["replaced"]
    assert run.noted("replaced") == ["node 0 opened a new session; the old one is closed"]
    # what the old one still says counts for nothing; that its connection ends disturbs nobody
    assert run.report(0, 0) == [Identify()]
    run.unsent(session_of(0))
    assert run.presence(0) is Presence.JOINING
    run.report(0, 0, session=b"other")
    assert len(run.frames) == 1


def test_a_second_hello_in_the_same_session_is_no_replacement(start):
    run = start(1)
    (welcome,) = run.hello(0)
    assert welcome.node == 0
    assert not run.noted("replaced")


def test_a_stranger_is_asked_for_its_name(start):
    run = start()
    assert run.report(3, 0) == [Identify()]
    assert run.progress(3, 0, bytes(16)) == [Identify()]
    assert run.leave(3) == []


# ---- reports and rounds -------------------------------------------------------------------------------------------


def test_a_round_closes_when_everyone_awaited_has_reported(start):
    run = start(3, quorum=3)
    for node in (2, 0):
        assert run.report(node, 0, codes=bytes([node + 1, 0])) == []
    assert run.conductor.reason(0.0) == "round 0: waiting for a quorum (2 of 2 reported, quorum 3)"
    (commit,) = run.report(1, 0, codes=b"\x02\x00")
    assert commit.participants == (0, 1, 2)
    assert commit.codes == b"\x01\x00\x02\x00\x03\x00"
    assert commit.previous == run.manifest.run_id
    assert [m for s, m in run.outbox if isinstance(m, Commit)] == [commit] * 3
    assert all(run.presence(node) is Presence.LIVE for node in range(3))


def test_the_commit_is_durable_before_anyone_sees_it(start):
    run = start(2, quorum=2)
    run.report(0, 0)
    effects = run.conductor.on_message(session_of(1), key_of(1), Report(0, b"\x01\x02"), 1.0)
    kinds = [type(effect) for effect in effects]
    assert kinds == [Persist, Send, Send]


def test_a_duplicate_counts_once_and_the_first_stands(start):
    run = start(2, quorum=2)
    run.report(0, 0, codes=b"\x01\x01")
    assert run.report(0, 0, codes=b"\x09\x09") == []
    run.report(1, 0)
    assert run.commits[0].codes[:2] == b"\x01\x01"


def test_a_late_report_counts_for_nothing(start):
    run = start(2)
    run.play([0], 1)
    assert run.report(1, 0) == []
    assert run.commits[0].participants == (0,)
    assert not run.conductor._round.codes_by_node
    assert run.presence(1) is Presence.LIVE


def test_a_report_of_the_wrong_length_is_noted_and_counts_for_nothing(start):
    run = start(1)
    assert run.report(0, 0, codes=b"\x01") == []
    assert run.noted("misfit") == ["round 0: report of node 0: 2 codes of 8 bits take 2 bytes, got 1"]
    assert not run.frames
    run.report(0, 0)
    assert len(run.frames) == 1


@pytest.mark.parametrize(
    ("bits", "reports", "packed"),
    [(4, (b"\xf1\x08", b"\x77\x09"), b"\xf1\x78\x97"), (1, (b"\x05", b"\x02\x01"), b"\x15\x08")],
)
def test_narrow_codes_share_the_bytes_of_a_commit(start, bits, reports, packed):
    run = start(2, quorum=2, directions=3, bits=bits)
    for node, codes in enumerate(reports):
        run.report(node, 0, codes=codes)
    (commit,) = run.commits
    assert commit.codes == packed
    first, second = (unpack(codes, 3, bits).tolist() for codes in reports)
    assert codes_of(commit, run.manifest).tolist() == first + second
    assert run.conductor.replica.digest() == run.replay().digest()


def test_codes_that_are_not_in_their_packed_form_count_for_nothing(start):
    run = start(1, directions=3, bits=1)
    assert run.report(0, 0, codes=b"\x0f") == []
    assert run.noted("misfit") == [
        "round 0: report of node 0: 3 codes of 1 bits are not in their packed form"
    ]
    assert not run.frames


# ---- directions that nodes share ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combine", "packed"),
    [("mean", b"\x09\x0d"), ("median", b"\x1c\x0d"), ("trimmed", b"\x09\x0d"), ("majority", b"\x03")],
)
def test_reports_for_the_same_directions_become_one_row(start, combine, packed):
    trim = 25 if combine == "trimmed" else 0
    run = start(3, quorum=3, policy="shared", combine=combine, trim=trim)
    for node, codes in ((1, b"\x10\x08"), (0, b"\x20\x80"), (2, b"\xe0\x0a")):
        run.report(node, 0, codes=codes)
    (commit,) = run.commits
    assert (commit.participants, commit.codes) == ((SHARED,), packed)
    assert run.conductor.replica.digest() == run.replay().digest()


def test_a_group_is_heard_if_one_of_its_nodes_is(start):
    run = start(3, quorum=2, policy="groups", groups=2)
    run.report(0, 0)
    run.report(2, 0)
    for node in (0, 1, 2):
        run.report(node, 1)
    assert [commit.participants for commit in run.commits] == [(GROUP_0,), (GROUP_0, GROUP_0 + 1)]
    assert codes_of(run.commits[0], run.manifest).tolist() == [23, -23]  # 16 √2
    assert codes_of(run.commits[1], run.manifest).tolist() == [23, -23, 16, -16]
    assert run.conductor.replica.digest() == run.replay().digest()


def test_who_is_shut_out_in_the_midst_of_a_round_is_not_in_what_is_combined(start):
    run = start(3, quorum=2, policy="shared")
    run.play(range(3), 1)
    run.report(0, 1, codes=b"\x7f\x7f")
    run.carry_out(run.conductor.on_shut_out(key_of(0), Refuse("revoked", "no"), run.now))
    run.report(1, 1, codes=b"\x10\xf0")
    run.report(2, 1, codes=b"\x10\xf0")
    assert codes_of(run.commits[1], run.manifest).tolist() == [23, -23]


def test_a_late_report_for_shared_directions_is_dropped(start):
    run = start(2, policy="shared")
    run.play([0], 1)
    assert run.report(1, 0) == []
    run.report(0, 1)
    run.report(1, 1)
    assert run.commits[1].late == ()
    assert codes_of(run.commits[1], run.manifest).tolist() == [23, -23]  # of two reports, not of three


def test_what_was_combined_is_told_node_by_node(start, monkeypatch):
    run, seen = start(3, quorum=3, policy="shared", combine="majority"), []
    do = run.coordinator.do
    monkeypatch.setattr(run.coordinator, "do", lambda effect: (seen.append(effect), do(effect)))
    run.play(range(3), 1)
    (persisted,) = [effect for effect in seen if isinstance(effect, Persist)]
    assert (persisted.nodes, persisted.reported) == ((0, 1, 2), 3 * b"\x10\xf0")


@pytest.mark.parametrize(("policy", "grows"), [("private", True), ("shared", False)])
def test_a_commit_of_shared_directions_does_not_grow_with_the_nodes(start, policy, grows):
    """The downlink of FeedSign: one row of codes, however many nodes there are."""
    sizes = []
    for nodes in (1, 4, 64):
        run = start(nodes, quorum=nodes, policy=policy, directions=8)
        for node in range(nodes):
            run.report(node, 0, codes=bytes([16] * 8))
        (frame,) = run.frames
        sizes.append(len(frame))
    assert (sizes[2] > sizes[1] > sizes[0]) == grows
    assert (sizes[2] == sizes[1] == sizes[0]) != grows


def test_one_bit_up_and_one_bit_down(start):
    """FeedSign: shared directions, one-bit codes, the majority of their signs."""
    run = start(5, quorum=5, directions=8, policy="shared", combine="majority", bits=1)
    for node, codes in enumerate((b"\xff", b"\x0f", b"\x0f", b"\xf0", b"\x00")):
        run.report(node, 0, codes=codes)
    (commit,) = run.commits
    assert commit.codes == b"\x0f"
    assert len(run.frames[0]) < 45


def test_reports_go_on_past_round_256(start):
    run = start(2, rounds=1000)
    run.play([0], 1)
    run.report(1, 0)
    run.play([0, 1], 600)
    assert len(run.frames) == 601
    assert all(commit.participants == (0, 1) for commit in run.commits[1:])


def test_a_round_waits_for_its_quorum_however_long(start):
    run = start(3, quorum=3)
    run.play([0, 1, 2], 3)
    run.report(0, 3)
    run.report(1, 3)
    assert run.conductor.wake_at() is None
    run.tick(1e6)
    assert len(run.frames) == 3
    run.hello(2, 3)  # it was not heard of for days
    run.report(2, 3)
    assert len(run.frames) == 4


def test_a_round_closes_at_its_deadline_without_the_missing(start):
    run = start(3)
    run.play([0], 1)
    for node in (1, 2):
        run.report(node, 0)
    run.play([0, 1, 2], 8)
    number = len(run.frames)
    opened = run.coordinator.now
    run.coordinator.now += 1.0
    run.report(0, number)
    run.report(1, number)
    wake_at = run.conductor.wake_at()
    assert opened + 1.0 < wake_at <= opened + 4.0
    run.tick(wake_at - 1e-6)
    assert len(run.frames) == number
    run.tick(wake_at)
    assert run.commits[-1].participants == (0, 1)
    assert run.presence(2) is Presence.SILENT
    assert run.noted("missed") == [f"round {number}: closed without [2] (2 of 3 reported, quorum 1)"]
    # the next round does not wait for the silent one
    run.play([0, 1], 1)
    assert len(run.frames) == number + 2
    # whose late report brings it back
    run.report(2, number)
    assert run.presence(2) is Presence.LIVE


def test_who_vanished_without_a_word_is_silent_and_then_gone(start):
    """Cut off from power, and not waited for since it was too slow: nobody would ever notice."""
    run = start(2)
    run.play([1], 1)
    run.report(0, 0)
    run.play([0, 1], 4)
    run.conductor.members[1].latency = None
    assert (run.presence(0), run.presence(1)) == (Presence.LIVE, Presence.LIVE)
    vanished = run.coordinator.now
    while run.coordinator.now < vanished + 140:
        run.coordinator.now += 5.0
        run.progress(0, 0, bytes(16))
        run.tick()
    assert run.presence(1) is Presence.LIVE
    run.tick(vanished + 165)
    assert (run.presence(0), run.presence(1)) == (Presence.LIVE, Presence.SILENT)
    run.report(1, run.conductor.round)
    assert run.presence(1) is Presence.LIVE
    vanished = run.coordinator.now
    while run.coordinator.now < vanished + 915:
        run.coordinator.now += 5.0
        run.progress(0, 0, bytes(16))
        run.tick()
    assert (run.presence(0), run.presence(1)) == (Presence.LIVE, Presence.GONE)
    assert run.noted("lost") == ["node 1 (n1) was not heard of for 900 s"]
    assert [type(m) for m in run.report(1, run.conductor.round)] == [Identify]
    run.hello(1, run.conductor.round)
    assert run.presence(1) is Presence.JOINING


def test_nobody_waits_for_a_node_that_left(start):
    run = start(2)
    run.play([0], 1)
    run.report(1, 0)
    run.play([0, 1], 4)
    run.leave(1)
    assert run.presence(1) is Presence.GONE
    assert run.noted("left") == ["node 1 (n1) left"]
    number = len(run.frames)
    run.report(0, number)
    assert run.commits[-1].participants == (0,)


def test_leaving_can_be_what_closes_a_round(start):
    run = start(2)
    run.play([0], 1)
    run.report(1, 0)
    run.play([0, 1], 4)
    number = len(run.frames)
    run.report(0, number)
    assert len(run.frames) == number
    run.leave(1)
    assert len(run.frames) == number + 1


def test_a_node_that_reported_and_left_still_counts(start):
    run = start(2, quorum=2)
    run.report(0, 0)
    run.leave(0)
    run.report(1, 0)
    assert run.commits[0].participants == (0, 1)


def test_a_frame_that_cannot_be_sent_loses_the_node_until_it_says_hello(start):
    run = start(2)
    run.play([0], 1)
    run.report(1, 0)
    run.play([0, 1], 4)
    number = len(run.frames)
    run.report(0, number)
    run.unsent(session_of(1))
    assert run.presence(1) is Presence.GONE
    assert len(run.frames) == number + 1
    assert run.noted("lost") == ["node 1 (n1) lost its connection"]
    assert run.report(1, number) == [Identify()]
    run.unsent(session_of(1))  # a second frame of the same batch
    welcome, history = run.hello(1, round=number)
    assert (welcome.round, len(history.frames)) == (number + 1, 1)


def test_a_late_report_after_its_commit_was_sent_in_vain_is_not_counted_again(start):
    run = start(2, quorum=2)
    run.play([0, 1], 1)
    run.hello(0, round=0, session=b"again")
    run.report(0, 0, session=b"again")
    assert len(run.frames) == 1
    assert run.conductor._round.codes_by_node == {}


# ---- speed --------------------------------------------------------------------------------------------------------


def race(run, seconds_by_node, rounds):
    """Seconds that `rounds` commits take when node i needs seconds_by_node[i] for a probe."""
    events = [(seconds, node, 0) for node, seconds in enumerate(seconds_by_node)]
    heapq.heapify(events)
    while len(run.frames) < rounds:
        wake_at = run.conductor.wake_at()
        if wake_at is not None and wake_at <= events[0][0]:
            run.tick(wake_at)
            continue
        now, node, round = heapq.heappop(events)
        run.coordinator.now = now
        if run.conductor.round == round or node == len(seconds_by_node) - 1:
            run.report(node, round)
        # the node goes on with the newest round it knows; one that waits for a commit looks again soon
        newest = run.conductor.round
        heapq.heappush(events, (now + (seconds_by_node[node] if newest > round else 0.01), node, newest))
    return run.coordinator.now


@pytest.mark.parametrize("others", [1, 3, 10])
def test_a_node_100_times_slower_costs_less_than_5_percent(start, others):
    alone = race(start(others, rounds=1000), [1.0] * others, 300)
    together = race(start(others + 1, rounds=1000), [1.0] * others + [100.0], 300)
    assert together < 1.05 * alone


def test_a_node_twice_as_slow_is_waited_for(start):
    run = start(4, rounds=1000)
    race(run, [1.0, 1.0, 1.0, 2.0], 60)
    assert sum(3 in commit.participants for commit in run.commits[10:]) > 45


def test_with_90_percent_of_the_nodes_lost_the_next_round_closes_within_one_deadline(start):
    run = start(20, rounds=1000)
    run.play([0], 1)
    for node in range(1, 20):
        run.report(node, 0)
    run.play(range(20), 10)
    number = len(run.frames)
    opened = run.coordinator.now
    run.coordinator.now += 1.0
    run.report(0, number)
    run.report(1, number)
    run.tick(run.conductor.wake_at())
    assert len(run.frames) == number + 1
    assert run.coordinator.now - opened <= 4.0
    # and those after it wait for nobody
    run.play([0, 1], 5)
    assert len(run.frames) == number + 6


def test_at_the_beginning_a_round_may_take_the_longest_wait(start):
    run = start(2, quorum=1, max_wait_s=7.0)
    run.report(0, 0)
    assert len(run.frames) == 1  # nobody else is live yet, so nobody is awaited


# ---- parity -------------------------------------------------------------------------------------------------------


def test_the_right_digest_is_recorded_with_the_loss(start):
    run = start(1)
    run.play([0], 4)
    digest = run.replay().digest()
    assert run.checkpoints.keys() == {4}
    assert run.progress(0, 4, digest, loss=4321) == []
    member = run.conductor.members[0]
    assert (member.digest_round, member.digest, member.loss) == (4, digest, 4.321)
    assert member.num_divergences == 0


def test_a_wrong_digest_is_named_and_the_node_told_to_start_over(start):
    run = start(1)
    run.play([0], 4)
    right = run.checkpoints[4][0]
    assert run.progress(0, 4, bytes(16)) == [Resync(4, right)]
    assert run.conductor.members[0].num_divergences == 1
    assert run.presence(0) is Presence.JOINING
    (text,) = run.noted("diverged")
    assert "node 0 (n0) differs at round 4" in text
    assert right.hex() in text
    # what was on its way says nothing now, and is no second divergence; from the start it may come again
    assert run.report(0, 4) == []
    assert run.progress(0, 4, bytes(16)) == []
    assert run.conductor.members[0].num_divergences == 1
    assert len(run.frames) == 4
    welcome, history = run.hello(0, round=0)
    assert welcome.round == 4
    assert len(history.frames) == 4


def test_a_node_that_differs_again_is_shut_out_until_released(start):
    run = start(1)
    run.play([0], 4)
    right = run.checkpoints[4][0]
    run.progress(0, 4, bytes(16))
    run.hello(0, round=0)
    assert run.progress(0, 4, bytes(16)) == [Resync(4, right)]
    assert run.quarantined == {0}
    # A choice is no way in: it was made no offer. Only a `Hello` is heard, and refused.
    head = decode_entry(run.frames[3]).digest()
    assert run.coordinator.message(session_of(0), key_of(0), Follow(4, head)) == []
    assert run.report(0, 4) == []
    assert len(run.frames) == 4
    (refusal,) = run.hello(0, round=0)
    assert refusal.cause == "quarantined"
    assert "`zo-coordinator release` lets it in again" in refusal.reason
    run.coordinator.start()
    assert run.hello(0, round=0)[0].cause == "quarantined"
    run.quarantined.clear()
    run.coordinator.start()
    assert isinstance(run.hello(0, round=0)[0], Welcome)


def test_the_first_wrong_round_is_found_from_the_nodes_trace(start):
    run = start(3)
    run.play([0, 1, 2], 8)
    rounds = len(run.frames)
    digests = [run.replay(number).digest() for number in range(rounds + 1)]

    def trace(node, first, digests):
        run.progress(node, 4, bytes(16))
        run.coordinator.message(session_of(node), key_of(node), Trace(first, tuple(digests)))

    trace(0, 2, [*digests[2:5], *[bytes(16)] * 4])
    assert run.noted("first-difference") == ["node 0 (n0): first different after 5 commits (equal until 4)"]
    trace(1, 3, [bytes(16)] * 5)
    assert run.noted("first-difference")[1:] == ["node 1 (n1): first different after 3 commits (or earlier)"]
    trace(2, 2, digests[2:])  # equal all the way: what differed is not in it
    assert len(run.noted("first-difference")) == 2


def test_a_trace_that_nobody_asked_for_makes_no_work(start):
    run = start(1)
    run.play([0], 8)
    asked = []
    run.coordinator.digests_between = lambda first, last: asked.append((first, last)) or []
    run.coordinator.start()
    run.hello(0, round=8)
    for _ in range(3):
        run.coordinator.message(session_of(0), key_of(0), Trace(2, (bytes(16),)))
    assert asked == []
    run.progress(0, 8, bytes(16))
    for _ in range(3):
        run.coordinator.message(session_of(0), key_of(0), Trace(2, (bytes(16),) * 5))
    assert asked == [(2, 6)]


def test_a_node_with_an_offer_gets_the_ledger_from_where_it_chooses(start):
    run = start(1)
    run.play([0], 8)
    offer = Offer(bytes(16), 6, 500, 100, 4, 900, 16, True)
    run.coordinator.offer_for = lambda round: offer if round == 0 else None
    run.coordinator.start()
    run.hello(0, round=8)
    (welcome,) = run.hello(1)
    assert welcome.offer == offer
    message = Fetch(bytes(16), 0)
    assert run.coordinator.message(session_of(1), key_of(1), message) == []
    assert run.pieces == [SendPiece(session_of(1), bytes(16), 0)]
    run.play([0], 1)  # what is made meanwhile is not for it yet
    assert [m for s, m in run.outbox if s == session_of(1)] == [welcome]
    head = decode_entry(run.frames[5]).digest()
    (history,) = run.coordinator.message(session_of(1), key_of(1), Follow(6, head))
    assert history == History(tuple(run.frames[6:]))
    # a second answer changes nothing
    assert run.coordinator.message(session_of(1), key_of(1), Follow(0, run.manifest.run_id)) == []


def test_a_choice_that_is_not_in_the_ledger_is_refused(start):
    run = start(1)
    run.play([0], 8)
    run.coordinator.offer_for = lambda round: Offer(bytes(16), 6, 500, 100, 4, 900, 16, True)
    run.coordinator.start()
    run.hello(1)
    (refusal,) = run.coordinator.message(session_of(1), key_of(1), Follow(6, bytes(16)))
    assert refusal.cause == "fork"
    assert run.presence(1) is Presence.GONE
    assert run.conductor.members[1].has_left, "the run's end will not wait for it"


def test_late_codes_count_in_the_next_round_where_the_manifest_allows_it(start):
    run = start(2, staleness=1, first_exponent=-4)
    for number in range(12):
        run.coordinator.now += 1.0
        run.report(0, number, codes=b"\x20\xe0")
        if len(run.frames) == number:
            run.tick(run.conductor.wake_at())
        assert len(run.frames) == number + 1
        run.report(1, number, codes=b"\x1d\xe3")  # after its round has closed
        run.report(1, number, codes=b"\x1d\xe3")  # and once more, as after a reconnection
    late = [commit for commit in run.commits if commit.late]
    # who is always one round late counts in every round but those whose exponent has changed
    assert len(late) >= 9
    for commit in run.commits:
        for node in commit.late:
            index = commit.participants.index(node)
            assert commit.codes[2 * index : 2 * index + 2] == b"\x1d\xe3"
    assert run.replay().round == len(run.frames)


def exponents_stay(run, number):
    """Whether the exponent of a round is that of the round before."""
    exponents = [run.manifest.schedule.first_exponent, *(commit.exponents[0] for commit in run.commits)]
    return exponents[number] == exponents[number - 1]


def test_late_codes_are_dropped_if_the_exponent_has_changed(start):
    run = start(2, staleness=1)
    run.play([0, 1], 3)
    for loud in (False, True):
        number = len(run.frames)
        run.coordinator.now += 1.0
        run.report(0, number, codes=b"\x7f\x81" if loud else b"\x20\xe0")  # cut off: the exponent goes up
        run.tick(run.conductor.wake_at())
        run.report(1, number, codes=b"\x1d\xe3")
        run.coordinator.now += 1.0
        run.report(0, number + 1, codes=b"\x20\xe0")
        run.tick(run.conductor.wake_at() or run.now)
        assert exponents_stay(run, number + 1) is not loud
        assert run.commits[number + 1].late == (() if loud else (1,))
        run.play([0, 1], 2)
    assert run.replay().digest() == run.conductor.replica.digest()


def test_fresh_codes_take_the_place_of_late_ones(start):
    run = start(3, staleness=1, quorum=2)
    run.play([0, 1, 2], 3)
    number = len(run.frames)
    run.coordinator.now += 1.0
    for node in (0, 2):
        run.report(node, number, codes=b"\x20\xe0")
    run.tick(run.conductor.wake_at())
    run.report(1, number, codes=b"\x1d\xe3")
    run.report(1, number + 1, codes=b"\x11\xef")
    run.report(1, number, codes=b"\x1d\xe3")  # sent again, it is still the older one
    for node in (0, 2):
        run.report(node, number + 1, codes=b"\x20\xe0")
    assert run.commits[number + 1].participants == (0, 1, 2)
    assert run.commits[number + 1].late == ()
    assert run.commits[number + 1].codes == b"\x20\xe0\x11\xef\x20\xe0"
    # and what was replaced is not counted after all
    run.report(1, number, codes=b"\x1d\xe3")
    run.play([0, 1, 2], 1)
    assert run.commits[number + 2].late == ()


def test_a_word_that_did_not_reach_a_node_makes_its_fault_no_second_one(start):
    run = start(1)
    run.play([0], 8)
    right = {number: run.checkpoints[number][0] for number in (4, 8)}
    assert run.progress(0, 4, bytes(16)) == [Resync(4, right[4])]
    run.unsent(session_of(0))  # the connection breaks, and takes the answer with it
    run.hello(0, round=4)
    assert run.progress(0, 8, bytes(16)) == [Resync(8, right[8])]
    assert run.conductor.members[0].num_divergences == 1
    assert len(run.noted("diverged")) == 1
    run.hello(0, round=0)
    assert run.noted("started-over") == ["node 0 (n0) starts over"]
    assert run.progress(0, 4, bytes(16)) == [Resync(4, right[4])]
    assert run.quarantined == {0}


def test_a_restart_drops_late_codes_rather_than_guess_their_exponent(start):
    run = start(2, staleness=1)
    run.play([0, 1], 3)
    run.coordinator.now += 1.0
    number = len(run.frames)
    run.report(0, number, codes=b"\x20\xe0")
    run.tick(run.conductor.wake_at())
    assert len(run.frames) == number + 1
    run.coordinator.start()
    run.hello(0, round=number + 1)
    run.hello(1, round=number)
    run.report(1, number, codes=b"\x1d\xe3")
    run.report(0, number + 1, codes=b"\x20\xe0")
    run.tick(run.now + 100)
    assert run.commits[number + 1].late == ()


def test_without_staleness_late_codes_never_count(start):
    run = start(2)
    run.play([0, 1], 3)
    number = len(run.frames)
    run.coordinator.now += 1.0
    run.report(0, number)
    run.tick(run.conductor.wake_at())
    run.report(1, number)
    run.play([0], 2)
    run.tick(run.now + 100)
    assert not any(commit.late for commit in run.commits)


def test_a_digest_of_a_round_that_was_not_recorded_is_not_judged(start):
    run = start(1)
    run.play([0], 5)
    assert run.progress(0, 5, bytes(16)) == []
    assert run.presence(0) is not Presence.GONE


# ---- the end ------------------------------------------------------------------------------------------------------


def test_the_last_commit_is_followed_by_the_end(start):
    run = start(2, rounds=3, quorum=2)
    run.play([0, 1], 3)
    digest = run.replay().digest()
    for node in (0, 1):
        received = [m for s, m in run.outbox if s == session_of(node)]
        assert [type(m) for m in received] == [Welcome, Commit, Commit, Commit, Finished]
        assert received[-1] == Finished(3, digest)
    assert run.conductor.is_over
    assert run.conductor.wake_at() is None
    assert run.checkpoints[3][0] == digest
    assert run.noted("finished") == [f"all 3 rounds are done, digest {digest.hex()}"]
    assert run.report(0, 3) == []
    assert run.progress(0, 3, digest) == []
    run.tick(1e9)
    assert len(run.frames) == 3
    run.leave(0)
    run.leave(1)
    assert not run.conductor.present


def test_a_node_that_comes_after_the_end_gets_everything_and_the_end(start):
    run = start(1, rounds=3)
    run.play([0], 3)
    welcome, history, finished = run.hello(1)
    assert (welcome.round, len(history.frames)) == (3, 3)
    assert finished == Finished(3, run.replay().digest())


def test_a_node_far_behind_at_the_end_gets_the_end_after_the_rest(start):
    run = start(1, rounds=300)
    run.play([0], 300)
    assert not [m for m in run.hello(1) if isinstance(m, Finished)]
    assert not [m for m in run.progress(1, 128, run.checkpoints[128][0]) if isinstance(m, Finished)]
    *_, finished = run.progress(1, 256, run.checkpoints[256][0])
    assert finished == Finished(300, run.replay().digest())
    assert run.progress(1, 300, run.checkpoints[300][0]) == []


def owed(run):
    return [member.node for member in run.conductor.owed_the_end(run.now)]


def test_a_run_that_is_over_is_served_until_everyone_has_left(start):
    run = start(2, rounds=3, quorum=2)
    run.play([0, 1], 3)
    assert owed(run) == [0, 1]
    assert run.conductor.reason(run.now) == (
        "all rounds are done: waiting for 0 (n0), 1 (n1) to fetch the end"
    )
    run.leave(0)
    assert owed(run) == [1]
    run.leave(1)
    assert owed(run) == []
    assert run.conductor.reason(run.now) == ""


def test_who_lost_its_connection_at_the_end_may_come_back_for_it(start):
    run = start(2, rounds=3, quorum=1)
    run.play([0, 1], 2)
    run.unsent(session_of(1))
    run.report(0, 2)
    run.leave(0)
    assert run.conductor.is_over
    assert owed(run) == [1]
    run.coordinator.now += FAREWELL_S - 1
    assert owed(run) == [1]
    _, history, finished = run.hello(1, 2)
    assert (len(history.frames), type(finished)) == (1, Finished)
    run.leave(1)
    assert owed(run) == []


def test_who_was_killed_long_before_the_end_is_not_waited_for(start):
    run = start(2, rounds=30, quorum=1)
    run.play([0, 1], 10)
    run.unsent(session_of(1))
    run.play([0], 20, seconds=FAREWELL_S / 10)
    run.leave(0)
    assert owed(run) == []


def test_after_a_restart_at_the_end_the_nodes_that_were_here_are_waited_for(start):
    run = start(3, rounds=3, quorum=2)
    run.play([0, 1, 2], 3)
    run.leave(2)
    run.outbox.clear()
    run.coordinator.now += 1000
    run.start()
    assert run.conductor.is_over
    assert owed(run) == [0, 1], "node 2 has left, and the ledger knows"
    *_, finished = run.hello(0, 3)
    assert finished == Finished(3, run.replay().digest())
    run.leave(0)
    assert owed(run) == [1]
    run.coordinator.now += FAREWELL_S
    assert owed(run) == []


# ---- restart ------------------------------------------------------------------------------------------------------


def test_a_restart_goes_on_with_the_same_steps_and_digests(start):
    through, stopped = start(2, quorum=2), start(2, quorum=2)
    through.play([0, 1], 12)
    stopped.play([0, 1], 7)
    stopped.coordinator.start()
    assert stopped.conductor.round == 7
    assert stopped.conductor.exponent == stopped.commits[-1].exponents[0]
    assert not stopped.conductor.present
    assert stopped.report(0, 7) == [Identify()]
    for node in (0, 1):
        (welcome,) = stopped.hello(node, round=7)
        assert (welcome.node, welcome.round) == (node, 7)
    stopped.play([0, 1], 5)
    assert stopped.frames == through.frames
    assert stopped.checkpoints == through.checkpoints
    assert stopped.replay().digest() == through.replay().digest()


def test_a_checkpoint_that_a_stop_left_out_is_made_up_for(start):
    run = start(1, rounds=4)
    run.play([0], 4)
    recorded = dict(run.checkpoints)
    run.checkpoints.clear()  # as if it had stopped between the commit and its digest
    run.coordinator.start()
    assert run.checkpoints == recorded


def test_nothing_is_made_up_for_at_the_start_of_a_run(start):
    run = start()
    assert run.checkpoints == {}
    assert run.conductor.settle() == []


# ---- overflow -----------------------------------------------------------------------------------------------------


def test_a_commit_that_would_overflow_is_never_made(start):
    run = start(1, step=4.0, decay="constant", rounds=1000)
    with pytest.raises(WeightsOverflow, match="leave ±8"):
        run.play([0], 400)
    shown = {m.round for _, m in run.outbox if isinstance(m, Commit)}
    assert shown == set(range(len(run.frames)))
    assert run.conductor.round == len(run.frames)
    assert run.replay().round == len(run.frames)
    # and a restart stands where it stopped, and stops there again
    number = len(run.frames)
    run.coordinator.start()
    run.hello(0, round=number)
    with pytest.raises(WeightsOverflow):
        run.report(0, number)
    assert len(run.frames) == number


# ---- moves --------------------------------------------------------------------------------------------------------


MOVE = bytes([10, 246, 20, 30, 200])


def test_a_round_of_slopes_and_moves_becomes_a_commit_with_both(start):
    run = start(projections=5, quorum=2)
    run.hello(0)
    welcome = next(m for m in run.hello(1, estimator="moves") if isinstance(m, Welcome))
    assert welcome.exponent == -4
    run.report(0, 0)
    run.report(1, 0, MOVE)
    (commit,) = run.commits
    assert commit.participants == (0, 1)
    assert commit.movers == (1,)
    assert commit.codes == b"\x10\xf0" + MOVE
    assert len(commit.steps) == len(commit.exponents) == 2
    assert commit.steps[1] == 2 ** (28 + 8 - 4) // (5 + 500)


def test_who_moves_and_who_does_not_is_told_its_own_exponent_after_a_restart(start):
    run = start(projections=5)
    for node, estimator in ((0, ""), (1, "moves")):
        run.hello(node, estimator=estimator)
    run.report(1, 0, bytes([2] * 5))
    run.report(0, 0, b"\x20\xe0")
    assert run.commits[0].exponents == (-4, -8)
    run.coordinator.start()
    welcomes = [
        next(m for m in run.hello(node, round=1, estimator=each) if isinstance(m, Welcome))
        for node, each in ((0, ""), (1, "moves"))
    ]
    assert [each.exponent for each in welcomes] == [-4, -8]


def test_a_report_of_the_wrong_class_is_a_misfit(start):
    run = start(projections=5)
    run.hello(0)
    run.hello(1, estimator="moves")
    run.report(0, 0, MOVE)
    run.report(1, 0, b"\x10\xf0")
    assert not run.commits
    assert len(run.noted("misfit")) == 2


def test_where_the_run_allows_no_moves_a_node_that_reports_them_is_refused(start):
    (refusal,) = start().hello(0, estimator="moves")
    assert refusal.cause == "estimator"
    assert "this node measures by 'moves'; this run allows two-sided" in refusal.reason


def test_a_late_move_counts_while_the_exponent_of_moves_stays(start):
    run = start(projections=5, staleness=1, quorum=1)
    run.hello(0)
    run.hello(1, estimator="moves")
    run.report(0, 0, b"\x20\xe0")
    run.tick(100.0)
    (first,) = run.commits
    assert first.movers == ()
    run.report(1, 0, MOVE)
    run.report(0, 1, b"\x20\xe0")
    run.tick(200.0)
    assert run.commits[1].movers == run.commits[1].late == (1,)
