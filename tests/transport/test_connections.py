"""Which connection has to go, decided without any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.connections import MOST_UNREAD_BYTES, Connections

KEY = b"k" * 32


@pytest.fixture
def connections():
    return Connections(most_silent=3, most_of_a_key=2)


def test_the_oldest_silent_one_of_the_busiest_address_goes(connections):
    assert [connections.accepted(number, "mallory", 0.0) for number in (10, 11)] == [None, None]
    assert connections.accepted(12, "ada", 0.0) is None
    assert connections.accepted(13, "ben", 0.0) == 10
    assert connections.accepted(14, "cho", 0.0) == 11
    assert len(connections) == 3


def test_one_that_spoke_is_not_among_the_silent(connections):
    for number in range(3):
        connections.accepted(number, "here", 0.0)
    assert connections.spoke(0, b"session", KEY) is None
    assert connections.accepted(3, "here", 0.0) is None
    assert connections.accepted(4, "here", 0.0) == 1


def test_a_key_has_so_many_connections_and_the_newest_stay(connections):
    for number in range(3):
        connections.accepted(number, "here", 0.0)
    assert connections.spoke(0, b"s0", KEY) is None
    assert connections.spoke(1, b"s1", KEY) is None
    assert connections.spoke(2, b"s2", KEY) == 0
    assert [connections.of_session(session) for session in (b"s0", b"s1", b"s2")] == [None, 1, 2]
    connections.accepted(3, "here", 0.0)
    assert connections.spoke(3, b"other", b"o" * 32) is None


def test_what_ended_counts_no_more(connections):
    for number in range(2):
        connections.accepted(number, "here", 0.0)
        connections.spoke(number, b"s%d" % number, KEY)
    connections.ended(0)
    connections.ended(0)
    connections.accepted(2, "here", 0.0)
    assert connections.spoke(2, b"s2", KEY) is None


def test_a_session_whose_connection_ended_is_not_given_to_the_next_with_its_number(connections):
    connections.accepted(7, "here", 0.0)
    connections.spoke(7, b"first", KEY)
    connections.accepted(7, "there", 1.0)  # the end of the first was not seen
    assert connections.of_session(b"first") is None
    connections.spoke(7, b"second", KEY)
    assert connections.spoke(7, b"first", KEY) is None
    assert connections.of_session(b"second") == 7
    assert connections.of_session(b"first") is None
    assert connections.spoke(99, b"never accepted", KEY) is None


def test_a_frame_of_one_that_ended_unseen_does_not_keep_its_successors_number(connections):
    connections.accepted(7, "here", 0.0)
    connections.accepted(7, "there", 1.0)  # the first has spoken, and ended, before anybody looked
    other = b"o" * 32
    spoken = [(b"first", KEY), (b"second", other), (b"first", KEY), (b"second", other)]
    for session, key in spoken:
        assert not connections.took(session, 10)
        assert connections.spoke(7, session, key) is None
        assert connections.took(session, 10)
        assert connections.of_session(session) == 7
    assert connections.of_session(b"first") is None
    for number in (8, 9):  # the first one's key has no connection any more
        connections.accepted(number, "here", 2.0)
        assert connections.spoke(number, b"s%d" % number, KEY) is None


def test_who_sends_far_more_than_is_taken_is_cut(connections):
    for number in (1, 2):
        connections.accepted(number, "here", 0.0)
    connections.spoke(2, b"s", KEY)
    assert connections.took(b"s", 5_000_000)
    received = {1: MOST_UNREAD_BYTES, 2: 5_000_000 + MOST_UNREAD_BYTES}
    assert connections.overfull(received.get, now=0.0) == []
    received = {1: MOST_UNREAD_BYTES + 5000, 2: 5_005_000 + MOST_UNREAD_BYTES}
    assert connections.overfull(received.get, now=0.0) == [1, 2]
    assert not connections.took(b"s", 1)
    assert len(connections) == 0


def test_a_year_of_heartbeats_is_not_held_against_anybody(connections):
    connections.accepted(1, "here", 0.0)
    year = 365 * 86400
    received = 600 + 42 * year // 30 + MOST_UNREAD_BYTES // 2
    assert connections.overfull(lambda _: received, now=year) == []
    assert connections.overfull(lambda _: None, now=year) == []


def test_what_a_session_that_has_ended_left_behind_is_not_the_next_ones():
    """A descriptor is given again at once; frames of the session before may still lie in a queue."""
    connections = Connections()
    connections.accepted(7, "a", 0)
    connections.spoke(7, b"old", b"key")
    connections.accepted(7, "a", 1)
    connections.spoke(7, b"old", b"key")
    assert not connections.took(b"old", 10)
    connections.spoke(7, b"new", b"key")
    assert connections.of_session(b"new") == 7


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 2)), max_size=100))
def test_whatever_happens_the_bounds_hold(events):
    connections = Connections(most_silent=3, most_of_a_key=2)
    silent, spoken = {}, {}
    for step, (what, number, who) in enumerate(events):
        if what == 0:
            silent.pop(number, None)
            spoken.pop(number, None)
            silent[number] = who
            cut = connections.accepted(number, str(who), step)
        elif what == 1:
            cut = connections.spoke(number, b"%d" % step, bytes([who]))
            if number in silent:
                del silent[number]
                spoken[number] = who
        else:
            cut = None
            connections.ended(number)
            silent.pop(number, None)
            spoken.pop(number, None)
        assert cut is None or (silent.pop(cut, None), spoken.pop(cut, None)) != (None, None)
        assert len(silent) <= 3
        assert all(list(spoken.values()).count(key) <= 2 for key in range(3))
        assert len(connections) == len(silent) + len(spoken)
