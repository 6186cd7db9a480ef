"""Commits in few bytes: whole again at the other side, and only there where the one before is."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.brevity import Abbreviator, brief, expanded
from transport.messages import Brief, decode_from_coordinator, encode
from zo.commit import Commit

ID = bytes(range(16))


def commit(round, previous=ID, participants=tuple(range(16)), late=(), step=2_000_000, exponent=-4):
    codes = bytes((round + node) % 256 for node in range(len(participants)))
    return Commit(round, (step + round,), (exponent,), participants, codes, previous, late)


def after(before, **changes):
    return msgspec.structs.replace(commit(before.round + 1, before.digest()), **changes)


@pytest.mark.parametrize("round", [0, 126, 127, 254, 255, 256, 70_000])
@pytest.mark.parametrize(("step", "exponent"), [(0, -64), (2**31 - 1, 63)])
def test_a_brief_commit_is_whole_again_after_the_one_before(round, step, exponent):
    before = commit(round)
    whole = after(before, steps=(step,), exponents=(exponent,))
    short = brief(before, whole)
    assert short is not None
    assert len(encode(short)) == 24, "where the whole one has 69"
    assert expanded(decode_from_coordinator(encode(short)), before) == whole


def test_late_participants_that_are_late_again_are_no_difference():
    before = commit(5, late=(3,))
    assert brief(before, after(before)) is None
    whole = after(before, late=(3,))
    assert expanded(brief(before, whole), before) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"participants": (*range(15), 16)},
        {"late": (3,)},
        {"previous": ID},
        {"round": 8},
        {"round": 6 + 256},
        {"participants": (), "codes": b""},
    ],
)
def test_what_differs_in_more_is_sent_whole(change):
    before = commit(5)
    assert brief(before, after(before, **change)) is None


@pytest.mark.parametrize(
    ("short", "reason"),
    [
        (Brief(7, bytes(21)), "is 7 modulo 256 does not follow 5"),
        (Brief(6, bytes(4)), "4 bytes are no commit of 1 classes"),
        (Brief(6, bytes(5)), "16 participants with 0 bytes of codes"),
        (Brief(6, b"\xff\xff\xff\xff" + bytes(17)), "step must be within"),
        (Brief(6, bytes(4) + b"\x7f" + bytes(16)), "exponent must be within"),
    ],
)
def test_what_cannot_be_a_commit_says_so(short, reason):
    with pytest.raises(ValueError, match=reason):
        expanded(short, commit(5))


@given(st.binary(max_size=60), st.integers(0, 255))
def test_any_brief_is_a_commit_that_follows_or_an_error(data, round):
    before = commit(round)
    try:
        whole = expanded(Brief((round + 1) % 256, data), before)
    except ValueError:
        return
    assert (whole.round, whole.previous, whole.participants) == (
        round + 1,
        before.digest(),
        before.participants,
    )


def frames(num):
    found = [commit(0)]
    while len(found) < num:
        found.append(after(found[-1]))
    return [each.encode() for each in found]


def test_a_session_gets_the_first_commit_whole_and_then_only_what_is_new():
    abbreviator = Abbreviator()
    seen = {b"a": None, b"b": None}
    for number, frame in enumerate(frames(6)):
        for session in seen:
            if session == b"b" and number < 2:
                continue
            sent = decode_from_coordinator(abbreviator.shortened(session, frame))
            is_first = number == (2 if session == b"b" else 0)
            assert isinstance(sent, Commit) == is_first
            seen[session] = expanded(sent, seen[session]) if isinstance(sent, Brief) else sent
            assert seen[session].encode() == frame


def test_whoever_missed_one_or_lost_it_gets_the_next_whole():
    abbreviator = Abbreviator()
    first, second, third, fourth = frames(4)
    assert abbreviator.shortened(b"a", first) == first
    assert abbreviator.shortened(b"b", first) == first
    assert abbreviator.shortened(b"a", second) != second
    assert abbreviator.shortened(b"b", third) == third
    abbreviator.forget(b"b")
    assert abbreviator.shortened(b"b", fourth) == fourth
    assert abbreviator.shortened(b"a", fourth) == fourth
