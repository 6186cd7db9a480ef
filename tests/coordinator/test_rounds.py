"""One round, in virtual time."""

import pytest

from coordinator.rounds import Outcome, Round, Verdict, decide, following, receive, withdraw


def with_reports(*nodes: int) -> Round:
    return Round(5, 100.0, dict.fromkeys(nodes, b"\x01\x02"))


def test_a_report_counts():
    collection, verdict, reason = receive(Round(5, 100.0), 3, 5, b"\x01\x02")
    assert (verdict, reason) == (Verdict.COUNTED, "")
    assert collection == Round(5, 100.0, {3: b"\x01\x02"})


def test_receiving_changes_no_round_but_returns_another():
    before = with_reports(1)
    after, _, _ = receive(before, 2, 5, b"\x03\x04")
    assert before.codes_by_node.keys() == {1}
    assert after.codes_by_node.keys() == {1, 2}


def test_an_early_report_is_kept_for_the_next_round():
    early, verdict, reason = receive(with_reports(1), 2, 6, b"\x03\x04")
    assert (verdict, reason) == (Verdict.EARLY, "")
    assert early.codes_by_node.keys() == {1}
    again, verdict, reason = receive(early, 2, 6, b"\x09\x09")
    assert (again, verdict) == (early, Verdict.DUPLICATE)
    assert reason == "round 6: node 2 reported before"
    assert following(early, 107.0) == Round(6, 107.0, {2: b"\x03\x04"})
    assert following(withdraw(early, 2), 107.0) == Round(6, 107.0)


@pytest.mark.parametrize(
    ("node", "number", "codes", "verdict", "reason"),
    [
        (1, 5, b"\x09\x09", Verdict.DUPLICATE, "round 5: node 1 reported before"),
        (2, 4, b"\x09\x09", Verdict.LATE, "round 4: report of node 2 came in round 5"),
    ],
)
def test_any_other_report_changes_nothing_and_says_why(node, number, codes, verdict, reason):
    before = with_reports(1)
    assert receive(before, node, number, codes) == (before, verdict, reason)


@pytest.mark.parametrize(
    ("reported", "awaited", "quorum", "now", "outcome", "reason"),
    [
        ((), (), 1, 100.0, Outcome.WAIT, "round 5: waiting for a quorum (0 of 0 reported, quorum 1)"),
        (
            (1,),
            (1, 2, 3),
            2,
            999.0,
            Outcome.WAIT,
            "round 5: waiting for a quorum (1 of 3 reported, quorum 2)",
        ),
        ((1, 2, 3), (1, 2, 3), 2, 100.0, Outcome.CLOSE, "round 5: closed (3 of 3 reported, quorum 2)"),
        ((1, 3), (1, 2, 3), 2, 109.9, Outcome.WAIT, "round 5: waiting for [2] (2 of 3 reported, quorum 2)"),
        (
            (1, 3),
            (1, 2, 3),
            2,
            110.0,
            Outcome.CLOSE,
            "round 5: closed without [2] (2 of 3 reported, quorum 2)",
        ),
        ((1, 3), (), 2, 100.0, Outcome.CLOSE, "round 5: closed (2 of 2 reported, quorum 2)"),
        ((9,), (1,), 1, 100.0, Outcome.WAIT, "round 5: waiting for [1] (1 of 2 reported, quorum 1)"),
    ],
)
def test_when_a_round_is_over(reported, awaited, quorum, now, outcome, reason):
    collection = with_reports(*reported)
    assert decide(collection, frozenset(awaited), quorum, 10.0, now) == (outcome, reason)


def test_the_deadline_is_the_very_sum_that_a_service_sleeps_until():
    # in floats 7.3 + 0.3 - 7.3 is less than 0.3: a service would wake up too early, again and again
    opened_at, wait = 7.3, 0.3
    assert (opened_at + wait) - opened_at < wait
    outcome, _ = decide(Round(0, opened_at, {0: b"\x01"}), frozenset({1}), 1, wait, opened_at + wait)
    assert outcome is Outcome.CLOSE


# ---- late reports -------------------------------------------------------------------------------------------------


def open_to_late(*nodes):
    return Round(5, 100.0, may_be_late=frozenset(nodes))


def test_a_late_report_counts_once():
    collection, verdict, reason = receive(open_to_late(1), 1, 4, b"\x01\x02")
    assert (verdict, reason) == (Verdict.COUNTED_LATE, "round 4: report of node 1 came in round 5")
    assert collection.late_by_node == {1: b"\x01\x02"}
    assert receive(collection, 1, 4, b"\x03\x04")[:2] == (collection, Verdict.LATE)


def test_a_late_report_makes_no_quorum_and_is_not_waited_for():
    collection, _, _ = receive(open_to_late(1), 1, 4, b"\x01\x02")
    assert decide(collection, frozenset(), 1, 0.0, 1e9)[0] is Outcome.WAIT


def test_fresh_codes_replace_late_ones_and_are_not_replaced_by_them():
    collection, _, _ = receive(open_to_late(1, 2), 1, 4, b"\x01\x02")
    collection, _, _ = receive(collection, 2, 4, b"\x05\x06")
    collection, verdict, _ = receive(collection, 1, 5, b"\x03\x04")
    assert verdict is Verdict.COUNTED
    assert collection.codes_by_node == {1: b"\x03\x04"}
    assert collection.late_by_node == {2: b"\x05\x06"}
    assert receive(collection, 1, 4, b"\x01\x02")[:2] == (collection, Verdict.LATE)


@pytest.mark.parametrize(("node", "number"), [(2, 4), (1, 3), (1, 0)])
def test_only_the_round_before_and_only_who_has_not_counted_there(node, number):
    before = open_to_late(1)
    assert receive(before, node, number, b"\x01\x02")[:2] == (before, Verdict.LATE)
