import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.ticket import Ticket, TicketError, parse_ticket, reachable_host

GOOD = Ticket("192.0.2.7", 7411, bytes(range(16)), bytes(range(32)))
TEXT = "zo://192.0.2.7:7411/000102030405060708090a0b0c0d0e0f#AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"


TOKEN = bytes(range(100, 116))


def test_a_token_stands_after_the_key():
    ticket = msgspec.structs.replace(GOOD, token=TOKEN)
    assert str(ticket) == TEXT + ".ZGVmZ2hpamtsbW5vcHFycw"
    assert parse_ticket(str(ticket)) == ticket
    assert parse_ticket(TEXT).token == b""


def test_a_ticket_shows_its_token_to_nobody():
    ticket = msgspec.structs.replace(GOOD, token=TOKEN)
    secret = str(ticket).rpartition(".")[2]
    assert secret not in repr(ticket)
    for broken in (str(ticket)[6:], "#" + str(ticket).partition("#")[2], str(ticket)[20:] + "!"):
        with pytest.raises(TicketError) as caught:
            parse_ticket(broken)
        assert secret[:4] not in str(caught.value)


def test_a_ticket_is_one_line_and_reads_back():
    assert str(GOOD) == TEXT
    assert parse_ticket(f"  {TEXT}\n") == GOOD


@given(
    st.sampled_from(["host.example", "10.1.2.3", "::1", "fe80::2"]),
    st.integers(1, 65535),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=32, max_size=32),
    st.sampled_from([b"", TOKEN]),
)
def test_every_ticket_reads_back(host, port, run_id, key, token):
    ticket = Ticket(host, port, run_id, key, token)
    assert parse_ticket(str(ticket)) == ticket
    assert ("[" in ticket.endpoint) == (":" in host)


def test_a_port_may_begin_with_zeros():
    assert parse_ticket(TEXT.replace(":7411", ":000000007411")) == parse_ticket(TEXT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a ticket"),
        ("http://example.org", "not a ticket"),
        (TEXT.replace(":7411", ""), "not a ticket"),
        (TEXT.replace(":7411", ":70000"), "port must be between 1 and 65535, got 70000"),
        (TEXT.replace(":7411", ":0"), "port must be between 1 and 65535, got 0"),
        (TEXT.replace(":7411", ":" + "9" * 5000), "port must be between 1 and 65535"),
        (TEXT.replace(":7411", ":٧٤"), "not a ticket"),
        (TEXT.replace("000102", "0001"), "32 hexadecimal digits, got 30"),
        (TEXT.replace("000102", "00010g"), "32 hexadecimal digits"),
        (TEXT.split("#")[0], "no key after '#'"),
        (TEXT[:-1], "43 characters after '#', got 42: was it cut off"),
        (TEXT[:-20], "was it cut off"),
        (TEXT.replace("#AA", "#A!"), "43 characters"),
        (TEXT + ".", "token must be 22 characters after '.', got 0: was it cut off"),
        (TEXT + ".ZGVmZ2hpamtsbW5vcHFyc", "got 21"),
        (TEXT + ".ZGVmZ2hpamtsbW5vcHFycx", "22 characters"),
        (TEXT + ".ZGVmZ2hpamtsbW5vcHFycw.x", "22 characters"),
    ],
)
def test_what_is_wrong_with_a_ticket_is_said(text, reason):
    with pytest.raises(TicketError, match=reason):
        parse_ticket(text)


@given(st.integers(0, len(TEXT) - 1))
def test_every_truncation_is_noticed(length):
    with pytest.raises(TicketError):
        parse_ticket(TEXT[:length])


@pytest.mark.parametrize("bound", ["127.0.0.1", "192.0.2.7", "::1", "[::1]", "gateway.example"])
def test_a_ticket_names_the_address_that_is_bound(bound):
    assert reachable_host(bound) == bound.strip("[]")


@pytest.mark.parametrize("bound", ["*", "0.0.0.0", "::"])
def test_a_ticket_for_any_address_never_names_loopback(bound):
    assert reachable_host(bound) not in ("127.0.0.1", "::1", "localhost", bound)
