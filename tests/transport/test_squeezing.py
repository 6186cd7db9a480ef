"""Squeezed frames: the same frame after it, shorter or as it was, and nothing that a frame claims is believed."""

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from transport.messages import (
    MAX_COORDINATOR_FRAME_BYTES,
    Finished,
    History,
    WireError,
    decode_from_coordinator,
    decode_from_node,
    encode,
)
from transport.squeezing import LEAST_BYTES, SqueezeError, is_squeezed, squeezed, unsqueezed
from zo.commit import Commit, Revert, chain_digest, decode_entry

ID = bytes(range(16))
LIMIT = MAX_COORDINATOR_FRAME_BYTES


def chain(num_rounds, num_nodes=4, directions=8, spread=32.0, head=ID):
    rng = np.random.default_rng(num_nodes)
    frames = []
    for round in range(num_rounds):
        codes = np.clip(np.rint(rng.standard_normal(num_nodes * directions) * spread), -127, 127)
        participants = tuple(range(num_nodes))
        commit = Commit(
            round, (2_000_000 + round,), (-4,), participants, codes.astype(np.int8).tobytes(), head
        )
        frames.append(commit.encode())
        head = chain_digest(frames[-1])
    return frames


def test_a_history_is_the_same_after_it_and_much_shorter():
    frames = chain(100)
    frame = encode(History(tuple(frames)))
    small = squeezed(frame)
    assert is_squeezed(small)
    assert len(small) < 0.6 * len(frame)
    assert decode_from_coordinator(small) == History(tuple(frames))
    assert unsqueezed(small, LIMIT) == frame


def test_a_history_over_a_revert_or_of_another_chain_is_the_same_after_it():
    frames = chain(10)
    frames.append(Revert(10, 3, 10, (), ID, chain_digest(frames[-1])).encode())
    frames += chain(3)  # not linked to what comes before
    assert decode_from_coordinator(squeezed(encode(History(tuple(frames))))) == History(tuple(frames))
    assert [decode_entry(frame).round for frame in frames] == [*range(11), 0, 1, 2]


def test_a_large_commit_is_the_same_after_it():
    (frame,) = chain(1, num_nodes=64, directions=16)
    small = squeezed(frame)
    assert len(small) < 0.97 * len(frame)
    assert decode_from_coordinator(small).encode() == frame


def test_what_would_not_get_shorter_stays_as_it_is():
    for frame in (b"", encode(Finished(9, ID)), bytes(LEAST_BYTES - 1)):
        assert squeezed(frame) is frame
    noise = encode(History((np.random.default_rng(0).bytes(500),)))[:-500] + np.random.default_rng(1).bytes(
        500
    )
    assert squeezed(noise) is noise


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(1, 200))
def test_whatever_the_history_it_is_the_same_after_it(nodes, num_codes):
    frames, head = [], ID
    for round, count in enumerate(nodes):
        commit = Commit(round, (7,), (-4,), tuple(range(count)), bytes(count * num_codes), head)
        frames.append(commit.encode())
        head = commit.digest()
    assert decode_from_coordinator(squeezed(encode(History(tuple(frames))))) == History(tuple(frames))


def box(data):
    return msgspec.msgpack.encode(data)


def test_a_bomb_is_refused_by_what_it_claims_before_anything_is_allocated():
    bomb = box(zstandard.compress(bytes(LIMIT + 1)))
    assert len(bomb) < 2000
    with pytest.raises(WireError, match=f"holds {LIMIT + 1} bytes; it may hold {LIMIT}"):
        decode_from_coordinator(bomb)


def test_one_that_claims_less_than_it_holds_is_refused():
    honest = bytearray(zstandard.compress(bytes(1_000_000)))
    at = honest.index((1_000_000).to_bytes(4, "little"))
    honest[at : at + 4] = (1000).to_bytes(4, "little")
    with pytest.raises(SqueezeError, match="not a squeezed frame"):
        unsqueezed(box(bytes(honest)), LIMIT)


def test_one_that_claims_nothing_is_refused():
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(SqueezeError, match="does not say how large it is; it may hold"):
        unsqueezed(box(endless), LIMIT)


def test_one_in_another_is_no_message():
    inner = squeezed(encode(History(tuple(chain(20)))))
    with pytest.raises(WireError, match="no message"):
        decode_from_coordinator(box(zstandard.compress(inner)))


def test_more_than_one_frame_is_refused():
    data = zstandard.compress(encode(Finished(9, ID)))
    assert decode_from_coordinator(box(data)) == Finished(9, ID)
    with pytest.raises(WireError, match="not a squeezed frame"):
        decode_from_coordinator(box(data + data))


@pytest.mark.parametrize(
    "frame",
    [
        [19, [b"\x93\x01\x02", b"\x90", b"\xc1"]],
        [19, [b"", [0] * 6]],
        [19, 5],
        [19, ["text"]],
    ],
)
def test_a_history_that_is_none_is_no_message(frame):
    with pytest.raises(WireError, match="no message"):
        decode_from_coordinator(box(zstandard.compress(msgspec.msgpack.encode(frame))))


def test_nodes_squeeze_nothing():
    with pytest.raises(WireError, match="no message"):
        decode_from_node(squeezed(encode(History(tuple(chain(20))))))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(data):
    for frame in (box(data), box(zstandard.compress(data))):
        try:
            decode_from_coordinator(frame)
        except WireError:
            continue


@given(st.data())
def test_a_flipped_byte_is_a_message_or_a_wire_error(data):
    frame = bytearray(squeezed(encode(History(tuple(chain(12))))))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decode_from_coordinator(bytes(frame))
    except WireError:
        return
