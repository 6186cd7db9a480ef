"""The bytes of every message. A failure here means that nodes in the field would no longer be understood."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.messages import (
    MAX_NODE_FRAME_BYTES,
    Admitted,
    Answer,
    Audit,
    Brief,
    Fetch,
    Finished,
    Follow,
    Hello,
    History,
    Identify,
    Leave,
    Offer,
    Piece,
    Progress,
    Redeem,
    Refuse,
    Report,
    Resync,
    Rotate,
    Sealed,
    Trace,
    Welcome,
    WireError,
    address,
    addressed,
    decode_from_coordinator,
    decode_from_node,
    encode,
)
from zo.commit import Commit

ID = bytes(range(16))
ID_HEX = "c4 10" + ID.hex()

KEY = bytes(range(32))

FROM_NODE = [
    (Hello(1, ID, ID, ID, 3, ID, "ada"), f"99 01 01 {ID_HEX} {ID_HEX} {ID_HEX} 03 {ID_HEX} a3 616461 a0"),
    (Report(round=9, codes=b"\x01\xff"), "d5 09 01 ff"),
    (Report(round=200, codes=b"\x01"), "d4 c8 01"),
    (Report(round=128, codes=bytes(64)), f"c7 40 80 {bytes(64).hex()}"),
    (Progress(300, ID, None), f"94 03 cd012c {ID_HEX} c0"),
    (Progress(300, ID, 4770), f"94 03 cd012c {ID_HEX} cd12a2"),
    (Leave(), "91 04"),
    (Fetch(ID, 65_536), f"93 05 {ID_HEX} ce00010000"),
    (Follow(300, ID), f"93 06 cd012c {ID_HEX}"),
    (Trace(7, (ID,)), f"93 07 07 91 {ID_HEX}"),
    (Redeem(ID, KEY), f"93 08 {ID_HEX} c4 20 {KEY.hex()}"),
    (Rotate(KEY), f"92 09 c4 20 {KEY.hex()}"),
    (Answer(300, np.array([4.5, 4.25], "<f4").tobytes()), "93 0a cd012c c4 08 0000904000008840"),
]
FROM_COORDINATOR = [
    (Welcome(1, 5, b"\x80", 7, -3, None), "97 10 01 05 c4 01 80 07 fd c0"),
    (
        Welcome(1, 5, b"", 7, -3, Offer(ID, 4, 100, 10, 3, 70, 7, True)),
        f"97 10 01 05 c4 00 07 fd 98 {ID_HEX} 04 64 0a 03 46 07 c3",
    ),
    (Welcome(1, 5, b"\x80", 7, (-3, -4), None), "97 10 01 05 c4 01 80 07 92 fd fc c0"),
    (Piece(ID, 0, 2, b"ab"), f"95 17 {ID_HEX} 00 02 c4 02 6162"),
    (Refuse("base", "no"), "93 11 a4 62617365 a2 6e6f"),
    (
        Commit(9, (70_000,), (-4,), (1, 3), b"\x01\xff", ID),
        f"99 12 09 91 ce00011170 91 fc 92 01 03 c4 02 01ff {ID_HEX} 90 90",
    ),
    (Brief(255, b"\x01\xff"), "d5 ff 01 ff"),
    (History((b"\x01", b"\x02\x03")), "92 13 92 c4 01 01 c4 02 0203"),
    (Resync(9, ID), f"93 14 09 {ID_HEX}"),
    (Identify(), "91 15"),
    (Finished(9, ID), f"93 16 09 {ID_HEX}"),
    (Audit(300, 2**32 - 1), "93 1b cd012c ceffffffff"),
    (Sealed(300, ID, bytes(64)), f"94 1a cd012c {ID_HEX} c4 40 {bytes(64).hex()}"),
    (Admitted(KEY), f"92 19 c4 20 {KEY.hex()}"),
]


@pytest.mark.parametrize(("message", "frame"), FROM_NODE, ids=lambda v: type(v).__name__)
def test_messages_from_a_node_on_the_wire(message, frame):
    assert encode(message).hex() == bytes.fromhex(frame).hex()
    assert decode_from_node(bytes.fromhex(frame)) == message


@pytest.mark.parametrize(("message", "frame"), FROM_COORDINATOR, ids=lambda v: type(v).__name__)
def test_messages_from_the_coordinator_on_the_wire(message, frame):
    assert encode(message).hex() == bytes.fromhex(frame).hex()
    assert decode_from_coordinator(bytes.fromhex(frame)) == message


@pytest.mark.parametrize(
    ("agent", "frame"),
    [(0, "d5 09 01ff"), (3, "03 d5 09 01ff"), (127, "7f d5 09 01ff")],
)
def test_a_frame_of_another_agent_than_0_begins_with_its_number(agent, frame):
    report = Report(round=9, codes=b"\x01\xff")
    assert address(encode(report), agent).hex() == bytes.fromhex(frame).hex()
    named, rest = addressed(bytes.fromhex(frame))
    assert (named, decode_from_node(rest)) == (agent, report)


@given(st.sampled_from(FROM_NODE + FROM_COORDINATOR), st.integers(0, 127))
def test_no_message_begins_like_an_agents_number(pinned, agent):
    frame = encode(pinned[0])
    assert addressed(address(frame, agent)) == (agent, frame)
    assert len(address(frame, agent)) == len(frame) + (agent > 0)


def test_agent_0_is_never_named():
    with pytest.raises(WireError, match="names agent 0"):
        addressed(b"\x00" + encode(Leave()))


@given(st.binary(max_size=40))
def test_any_bytes_are_addressed_or_a_wire_error(frame):
    try:
        agent, rest = addressed(frame)
    except WireError:
        return
    assert address(rest, agent) == frame


@pytest.mark.parametrize("round", [0, 127, 255])
def test_a_report_of_64_directions_has_at_most_70_bytes_in_any_round(round):
    assert len(encode(Report(round, bytes(64)))) <= 70


@pytest.mark.parametrize("round", [0, 299, 65_535])
def test_a_commit_of_4_nodes_and_64_directions_has_at_most_300_bytes(round):
    commit = Commit(round, (2**31 - 1,), (-64,), (0, 1, 2, 3), bytes(256), ID)
    assert len(encode(commit)) <= 300


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "truncated"),
        (b"\xc1", "no message"),
        (b"\x91\x63", "Invalid value 99"),
        (b"\x94\x03\x09\xc4", "truncated"),
        (bytes.fromhex("93 02 09 c4 01 01"), "Invalid value 2"),
        (bytes.fromhex("d5 09 01"), "truncated"),
        (bytes.fromhex("d4 09 01 01"), "trailing"),
        (bytes.fromhex("c7 00 09"), "length >= 1"),
        (b"\xc8\x10\x01\x09" + bytes(4097), "length <= 4096"),
        (bytes.fromhex("93 03 00 c4 03 010203"), "length 4, got 3"),
        (bytes.fromhex("94 03 00 c4 03 010203 c0"), "length >= 16"),
        (bytes.fromhex("91 10"), "Invalid value 16"),
        (bytes(MAX_NODE_FRAME_BYTES + 1), "frame of 8193 bytes"),
    ],
)
def test_what_is_no_message_from_a_node_is_said(frame, reason):
    with pytest.raises(WireError, match=reason):
        decode_from_node(frame)


@pytest.mark.parametrize(
    ("commit", "reason"),
    [
        ([18, -1, [1], [0], [0], b"a", ID], "round"),
        ([18, 0, [], [0], [0], b"a", ID], "one or two classes"),
        ([18, 0, [1], [0], [0], b"a", ID, [], [0]], "no step for moves"),
        ([18, 0, [1, 1], [0, 0], [0], b"a", ID, [], [1]], "movers must be ascending participants"),
        ([18, 0, [2**31], [0], [0], b"a", ID], "step must"),
        ([18, 0, [1], [64], [0], b"a", ID], "exponent must"),
        ([18, 0, [1], [0], [1, 0], b"ab", ID], "ascending"),
        ([18, 0, [1], [0], [0, 1], b"", ID], "2 participants with 0 bytes of codes"),
        ([18, 0, [1], [0], [0], b"a", ID[:15]], "16 bytes"),
        ([18, 0, [1], [0], [0], b"a", ID, [0]], "round 0 has no round before"),
        ([18, 1, [1], [0], [0], b"a", ID, [1]], "late must be ascending participants"),
    ],
)
def test_an_impossible_commit_is_no_message(commit, reason):
    with pytest.raises(WireError, match=reason):
        decode_from_coordinator(msgspec.msgpack.encode(commit))


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_wire_error(frame):
    for decode in (decode_from_node, decode_from_coordinator):
        try:
            message = decode(frame)
        except WireError:
            continue
        assert decode(encode(message)) == message


@given(st.data())
def test_a_flipped_or_cut_frame_is_a_message_or_a_wire_error(data):
    message, _ = data.draw(st.sampled_from(FROM_NODE + FROM_COORDINATOR))
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    for decode in (decode_from_node, decode_from_coordinator):
        try:
            decode(cut)
        except WireError:
            continue
