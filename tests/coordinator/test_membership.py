"""Members: every arrow of the transition table, and the flow window."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.membership import (
    FAREWELL_S,
    FLOW_WINDOW,
    QUIET_AFTER_S,
    TRANSITIONS,
    Event,
    Member,
    Presence,
    transition,
)
from coordinator.pace import Latency
from transport.messages import REPORT_ROUND_MODULUS

GONE, JOINING, LIVE, SILENT = Presence.GONE, Presence.JOINING, Presence.LIVE, Presence.SILENT

ARROWS = [
    (GONE, Event.HELLO, JOINING),
    (JOINING, Event.REPORTED, LIVE),
    (JOINING, Event.LOST, GONE),
    (JOINING, Event.LEFT, GONE),
    (LIVE, Event.HELLO, JOINING),
    (LIVE, Event.MISSED, SILENT),
    (LIVE, Event.QUIET, SILENT),
    (LIVE, Event.LOST, GONE),
    (LIVE, Event.LEFT, GONE),
    (SILENT, Event.HELLO, JOINING),
    (SILENT, Event.HEARD, LIVE),
    (SILENT, Event.LOST, GONE),
    (SILENT, Event.LEFT, GONE),
]


def member(**given: object) -> Member:
    return Member(**{"node": 1, "key": bytes(32), "name": "n", **given})


@pytest.mark.parametrize(("presence", "event", "expected"), ARROWS)
def test_every_arrow(presence, event, expected):
    someone = member(presence=presence, session=b"s")
    someone.note(event)
    assert someone.presence is expected
    assert someone.session == (None if expected is GONE else b"s")


def test_there_are_no_other_arrows():
    assert {(presence, event): after for presence, event, after in ARROWS} == TRANSITIONS
    for presence, event in itertools.product(Presence, Event):
        if (presence, event) not in TRANSITIONS:
            assert transition(presence, event) is presence


def test_everyone_can_leave_be_lost_and_come_back():
    for presence in Presence:
        for event in (Event.LEFT, Event.LOST):
            assert transition(presence, event) is GONE
        assert transition(presence, Event.HELLO) is JOINING


@pytest.mark.parametrize(
    ("state", "owed_s"),
    [
        # who went without a word, or was here when the coordinator was killed
        ({"presence": GONE}, FAREWELL_S),
        ({"presence": GONE, "latency": Latency(100.0, 0.0)}, 2 * Latency(100.0, 0.0).timeout_s),
        # who is here may be loading a base or in the midst of a probe, and has not read what it was told
        ({"presence": LIVE, "is_finished": True}, QUIET_AFTER_S),
        ({"presence": JOINING}, QUIET_AFTER_S),
        ({"presence": LIVE}, QUIET_AFTER_S),
        ({"presence": SILENT, "latency": Latency(100.0, 0.0)}, 2 * Latency(100.0, 0.0).timeout_s),
        ({"presence": GONE, "has_left": True}, 0.0),
    ],
)
def test_how_long_a_run_that_is_over_is_served_for_a_member(state, owed_s):
    someone = member(heard_at=1000.0, **state)
    assert someone.is_owed_the_end(1000.0 + owed_s - 0.001) is (owed_s > 0)
    assert not someone.is_owed_the_end(1000.0 + owed_s)


def test_who_left_has_left_until_it_comes_back():
    someone = member()
    for event, has_left in (
        (Event.HELLO, False),
        (Event.LOST, False),
        (Event.HELLO, False),
        (Event.LEFT, True),
        (Event.LOST, True),
        (Event.HEARD, True),
        (Event.HELLO, False),
    ):
        someone.note(event)
        assert someone.has_left is has_left


@pytest.mark.parametrize(
    ("latency", "quiet_s", "expected"),
    [
        (None, 149.9, None),
        (None, 150.0, Event.QUIET),
        (None, 900.0, Event.LOST),
        (Latency(1.0, 0.1), 150.0, Event.QUIET),
        (Latency(200.0, 0.0), 400.0, None),  # a slow machine is not taken for a dead one
        (Latency(200.0, 0.0), 401.0, Event.QUIET),
        (Latency(200.0, 0.0), 1601.0, Event.QUIET),
        (Latency(200.0, 0.0), 1602.0, Event.LOST),
    ],
)
def test_what_silence_means(latency, quiet_s, expected):
    assert member(heard_at=1000.0, latency=latency).silence(1000.0 + quiet_s) is expected


def test_the_flow_window():
    someone = member(acknowledged=10, cursor=10)
    assert someone.room() == FLOW_WINDOW
    someone.cursor += FLOW_WINDOW
    assert someone.room() == 0
    someone.acknowledge(20)
    assert someone.room() == 10


def test_an_acknowledgement_goes_neither_back_nor_past_what_was_sent():
    someone = member(acknowledged=10, cursor=15)
    someone.acknowledge(5)
    assert someone.acknowledged == 10
    someone.acknowledge(1000)
    assert someone.acknowledged == 15


@given(st.integers(0, 10**6), st.integers(0, FLOW_WINDOW), st.data())
def test_a_round_modulo_256_names_one_round_of_the_window(acknowledged, ahead, data):
    someone = member(acknowledged=acknowledged, cursor=acknowledged + ahead)
    round = data.draw(st.integers(acknowledged, acknowledged + ahead))
    assert someone.resolve(round % REPORT_ROUND_MODULUS) == round


@given(
    st.integers(0, 10**6), st.integers(0, FLOW_WINDOW), st.integers(1, REPORT_ROUND_MODULUS - FLOW_WINDOW - 1)
)
def test_a_round_just_outside_the_window_names_none(acknowledged, ahead, distance):
    someone = member(acknowledged=acknowledged, cursor=acknowledged + ahead)
    assert someone.resolve((someone.cursor + distance) % REPORT_ROUND_MODULUS) is None
