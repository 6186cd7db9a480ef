"""Who keeps to the protocol never meets the limits; who does not, meets them soon."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.limits import Limits

KEY = b"k" * 32


def test_a_node_may_answer_a_million_commits_in_no_time():
    limits = Limits()
    assert limits.may_speak(KEY, 0.0)
    for _ in range(100_000):
        limits.was_sent(KEY, "Commit", 300)
        assert limits.may_speak(KEY, 0.0)  # a report
        assert limits.may_speak(KEY, 0.0)  # a progress


def test_a_node_may_acknowledge_every_entry_of_a_history_and_fetch_every_piece():
    limits = Limits()
    assert limits.may_speak(KEY, 0.0)
    for _ in range(100):
        limits.was_sent(KEY, "History", 60_000)
        assert all(limits.may_speak(KEY, 0.0) for _ in range(128))
    for _ in range(100_000):
        limits.was_sent(KEY, "Piece", 32_800)
        assert limits.may_speak(KEY, 0.0)


def test_pieces_of_what_there_is_not_are_answered_for_so_long():
    limits = Limits()
    number = 0
    while limits.may_speak(KEY, 0.0):
        limits.was_sent(KEY, "Piece", 30)
        number += 1
    assert number == 1024


def test_who_speaks_unasked_is_stopped_after_a_thousand():
    limits = Limits()
    assert sum(limits.may_speak(KEY, 0.0) for _ in range(5000)) == 1024
    assert sum(limits.may_speak(KEY, 10.0) for _ in range(5000)) == 500
    assert limits.may_speak(b"another key" * 2, 0.0)


@given(st.lists(st.floats(0.2, 5.0), max_size=200))
def test_a_link_that_breaks_after_every_handshake_is_no_flood(waits):
    limits, now = Limits(), 0.0
    for wait in waits:
        assert limits.may_greet(KEY, now)
        now += wait


def test_hello_without_end_is_stopped():
    limits = Limits()
    assert sum(limits.may_greet(KEY, 0.0) for _ in range(1000)) == 100
