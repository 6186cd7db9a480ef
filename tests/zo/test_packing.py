"""Packed codes: what goes in comes out, in as few bytes as the width promises, and in one form only."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo.codes import CUT_OFF_BY_BITS, LEVELS_BY_BITS, NO_VOTE, UNIT_BY_BITS
from zo.commit import Commit
from zo.packing import codes_of, expressible, most_bytes, pack, unpack

WIDTHS = (8, 4, 1)
LEVELS = {4: range(-7, 8), 1: (-1, 1)}
UNIT = {4: 12, 1: 32}


def plainly_packed(codes: list[int], bits: int) -> bytes:
    """Bit by bit, as the words of the module say."""
    if bits == 8:
        return bytes(code % 256 for code in codes)
    packed = bytearray(-(-len(codes) * bits // 8))
    marks = bytearray(packed)
    for i, code in enumerate(codes):
        at, shift = divmod(i * bits, 8)
        if bits == 4:
            packed[at] |= (-8 if code == NO_VOTE else code // 12) % 16 << shift
        elif code == NO_VOTE:
            marks[at] |= 1 << shift
        else:
            packed[at] |= (code > 0) << shift
    return bytes(packed + marks) if any(marks) else bytes(packed)


def some_codes(bits):
    values = range(-128, 128) if bits == 8 else [NO_VOTE, *(UNIT[bits] * level for level in LEVELS[bits])]
    return st.lists(st.sampled_from(list(values)), max_size=70)


@given(st.data(), st.sampled_from(WIDTHS))
def test_what_is_packed_comes_out_again_and_is_as_the_plain_form_says(data, bits):
    codes = data.draw(some_codes(bits))
    packed = pack(np.array(codes, np.int8), bits)
    assert packed == plainly_packed(codes, bits)
    assert unpack(packed, len(codes), bits).tolist() == codes
    assert unpack(packed, len(codes), bits).dtype == np.int8
    assert len(packed) <= most_bytes(len(codes), bits)


@given(st.binary(max_size=24), st.integers(0, 40), st.sampled_from(WIDTHS))
def test_whatever_is_read_has_that_form_alone(data, num, bits):
    try:
        codes = unpack(data, num, bits)
    except ValueError:
        return
    assert pack(codes, bits) == data


def test_bytes_are_pinned():  # changing this breaks every ledger and every node in the field
    assert pack(np.array([12, -12, NO_VOTE, 84, -84], np.int8), 4) == bytes.fromhex("f1 78 09")
    assert pack(np.array([32, -32, 32] + [-32] * 5 + [32], np.int8), 1) == bytes.fromhex("05 01")
    assert pack(np.array([32, NO_VOTE, 32] + [-32] * 6, np.int8), 1) == bytes.fromhex("05 00 02 00")
    assert pack(np.array([1, -1, NO_VOTE, 127], np.int8), 8) == bytes.fromhex("01 ff 80 7f")


@pytest.mark.parametrize(
    ("data", "num", "bits", "message"),
    [
        (b"\x01", 2, 8, "2 codes of 8 bits take 2 bytes, got 1"),
        (b"\x01\x01", 2, 4, "2 codes of 4 bits take 1 bytes, got 2"),
        (b"\x11", 1, 4, "1 codes of 4 bits are not in their packed form"),  # the second half is used
        (b"\x02", 1, 1, "not in their packed form"),  # a bit past the end
        (b"\x01\x00", 8, 1, "not in their packed form"),  # marks that mark nothing
        (b"\x01\x01", 8, 1, "not in their packed form"),  # a vote that is marked as none
        (b"\x00\x80", 7, 1, "not in their packed form"),  # a mark past the end
        (b"\x00\x00\x00", 8, 1, "8 codes of 1 bits take 1 bytes, got 3"),
        (b"\x00", 0, 1, "0 codes of 1 bits take 0 bytes, got 1"),
    ],
)
def test_another_form_is_refused(data, num, bits, message):
    with pytest.raises(ValueError, match=message):
        unpack(data, num, bits)


@pytest.mark.parametrize(
    ("bits", "code"), [(4, 1), (4, 85), (4, 96), (4, -96), (4, -127), (1, 0), (1, 31), (1, -33)]
)
def test_a_code_that_a_width_lacks_is_refused(bits, code):
    with pytest.raises(ValueError, match=f"{code} is no code of {bits} bits"):
        pack(np.array([UNIT[bits], code], np.int8), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_codes_of_a_width(bits):
    codes = expressible(bits).astype(int)
    assert codes.size == len(set(codes.tolist())) == {8: 256, 4: 16, 1: 3}[bits]
    votes = codes[codes != NO_VOTE]
    assert NO_VOTE in codes
    assert max(abs(votes)) == UNIT_BY_BITS[bits] * LEVELS_BY_BITS[bits]
    assert (max(abs(votes)) == CUT_OFF_BY_BITS[bits]) == (bits > 1)


def test_the_codes_of_a_commit_are_as_many_as_the_manifest_says(make_manifest):
    manifest = make_manifest(directions=3, bits=4)
    codes = np.array([12, 24, NO_VOTE, -84, 0, 36], np.int8)
    commit = Commit(0, (1,), (0,), (3, 9), pack(codes, 4), bytes(16))
    assert codes_of(commit, manifest).tolist() == codes.tolist()
    with pytest.raises(ValueError, match="commit of round 0: 3 codes of 4 bits take 2 bytes, got 3"):
        codes_of(msgspec.structs.replace(commit, participants=(3,)), manifest)
    with pytest.raises(ValueError, match="commit of round 0: 2 codes of 8 bits take 2 bytes, got 3"):
        codes_of(msgspec.structs.replace(commit, participants=(3,)), make_manifest(directions=2))


def test_a_report_of_64_directions_in_one_bit_has_8_bytes():
    assert most_bytes(64, 8) == 64
    assert most_bytes(64, 4) == 32
    assert most_bytes(64, 1) == 16
    assert len(pack(np.full(64, 32, np.int8), 1)) == 8
