"""What `join --show-wire` prints."""

import re

import pytest

from node.wire import shown
from transport.messages import Hello, Report, WireError, address, encode

ID = bytes(range(16))


def test_a_report_with_its_bytes():
    assert shown(encode(Report(9, b"\x01\xff"))) == (
        "sent 4 bytes, encrypted 39: Report(round=9, codes=b'\\x01\\xff')\n    d5 09 01 ff"
    )


def test_of_whom_it_is():
    assert shown(address(encode(Report(9, b"\x01")), 3)).startswith(
        "sent 4 bytes, encrypted 39: for agent 3, Report("
    )


@pytest.mark.parametrize("message", [Hello(1, ID, ID, ID, 3, ID, "ada"), Report(200, bytes(1000))])
def test_every_byte_is_there(message):
    frame = encode(message)
    _, *lines = shown(frame).split("\n")
    assert bytes.fromhex("".join(lines)) == frame
    assert all(re.fullmatch(r"    ([0-9a-f]{2} ?){1,32}", line) for line in lines)


def test_what_is_no_message_is_not_made_up():
    with pytest.raises(WireError):
        shown(b"\xc1")
