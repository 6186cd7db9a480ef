"""Commits: one form in bytes, one digest, and no impossible commit."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo.commit import STEP_MAX, Commit, chain_digest, decode_entry
from zo.directions import GROUP_0, INITIAL, MAX_NODE, SEED_POOL, SHARED

PREVIOUS = bytes(range(16))
COMMIT = Commit(9, (1000,), (-4,), (0, 3), b"\x01\xff\x80\x7f", PREVIOUS)


def test_bytes_and_digest_are_pinned():  # changing this breaks every ledger and every node in the field
    assert COMMIT.encode() == bytes.fromhex(
        "99" "12" "09" "91cd03e8" "91fc" "920003" "c40401ff807f" "c410000102030405060708090a0b0c0d0e0f" "90" "90"
    )  # fmt: skip
    assert COMMIT.digest().hex() == "a5f3e88acd081d6d7fa1d576062bcdec"
    assert chain_digest(COMMIT.encode()) == COMMIT.digest()
    assert decode_entry(COMMIT.encode()) == COMMIT


def test_a_commit_of_4_nodes_with_64_directions_fits_300_bytes():
    commit = Commit(10**6, (STEP_MAX,), (-12,), (0, 1, 2, 3), bytes(256), PREVIOUS)
    assert len(commit.encode()) <= 300


@pytest.mark.parametrize("participants", [(SHARED,), (GROUP_0, GROUP_0 + 251)])
def test_directions_that_nodes_share_take_part_under_their_reserved_numbers(participants):
    commit = msgspec.structs.replace(COMMIT, participants=participants)
    assert decode_entry(commit.encode()) == commit


def test_a_round_without_votes_is_a_commit_too():
    empty = Commit(0, (0,), (0,), (), b"", PREVIOUS)
    assert decode_entry(empty.encode()) == empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": -1}, "round must not be negative, got -1"),
        ({"steps": ()}, "one or two classes of codes are known, got 0 steps"),
        ({"steps": (1, 2)}, "one or two classes of codes are known, got 2 steps"),
        ({"exponents": (1, 2)}, "2 exponents"),
        ({"steps": (-1,)}, "step must be within 0 and 2147483647, got -1"),
        ({"steps": (2**31,)}, "step must be within"),
        ({"exponents": (-65,)}, "exponent must be within -64 and 63, got -65"),
        ({"exponents": (64,)}, "exponent must be within"),
        ({"participants": (3, 0)}, "ascending and distinct"),
        ({"participants": (3, 3)}, "ascending and distinct"),
        ({"participants": (-1, 3)}, f"participants must be within 0 and {MAX_NODE}"),
        (
            {"participants": (0, INITIAL)},
            f"participants must be within 0 and {MAX_NODE}, or groups, or everyone",
        ),
        ({"participants": (0, SEED_POOL)}, f"participants must be within 0 and {MAX_NODE}"),
        ({"participants": ()}, "0 participants with 4 bytes of codes"),
        ({"codes": b""}, "2 participants with 0 bytes of codes"),
        ({"previous": b"short"}, "the previous digest must have 16 bytes, got 5"),
    ],
)
def test_an_impossible_commit_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        msgspec.structs.replace(COMMIT, **change)
    plain = {name: getattr(COMMIT, name) for name in COMMIT.__struct_fields__} | change
    with pytest.raises(ValueError, match=message):
        decode_entry(msgspec.msgpack.encode([18, *plain.values()]))


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x90", COMMIT.encode()[:-1], COMMIT.encode() + b"\x00"])
def test_what_is_no_commit_is_refused(frame):
    with pytest.raises(ValueError, match="not a ledger entry"):
        decode_entry(frame)


def test_another_form_of_the_same_commit_is_refused_since_its_digest_would_be_another():
    frame = COMMIT.encode()
    assert frame[2] == 9
    wider = frame[:2] + b"\xcc\x09" + frame[3:]  # round 9 as a uint8 with its own prefix
    assert msgspec.msgpack.decode(wider, type=Commit) == COMMIT
    with pytest.raises(ValueError, match="the entry of round 9 is not in its canonical form"):
        decode_entry(wider)


@given(st.integers(0, len(COMMIT.encode()) - 1), st.integers(1, 255))
def test_every_changed_byte_changes_the_digest_or_is_refused(index, flip):
    frame = bytearray(COMMIT.encode())
    frame[index] ^= flip
    try:
        commit = decode_entry(bytes(frame))
    except ValueError:
        return
    assert commit.digest() != COMMIT.digest()
