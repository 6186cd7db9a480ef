"""The proof before serving: it holds for a closed gate, and fails for one that is not."""

import pytest

from transport.gate import Gate
from transport.keys import new_key_pair
from transport.selftest import prove_closed
from transport.sockets import CoordinatorSocket, Link, NodeSocket, SocketError
from transport.ticket import Ticket

pytestmark = pytest.mark.attack


def serve(admits, host="127.0.0.1"):
    keys = new_key_pair()
    return CoordinatorSocket(host, 0, keys, admits), keys.public


@pytest.mark.parametrize("host", ["127.0.0.1", "*", "0.0.0.0", "localhost", "::1", "::"])
def test_a_closed_gate_is_proved(host):
    try:
        end, public = serve(lambda key: False, host)
    except SocketError:
        pytest.skip("no IPv6 here")
    prove_closed(end, host, public)
    end.close()


def test_an_open_gate_is_found():
    end, public = serve(lambda key: True)
    with pytest.raises(SocketError, match="self-test: a random key was let in"):
        prove_closed(end, "127.0.0.1", public)
    end.close()


def test_a_gate_that_does_not_answer_is_found(monkeypatch):
    monkeypatch.setattr("transport.selftest._PATIENCE_S", 0.2)
    monkeypatch.setattr(Gate, "answer", lambda self: None)
    end, public = serve(lambda key: False)
    with pytest.raises(SocketError, match="a random key got no answer"):
        prove_closed(end, "127.0.0.1", public)
    end.close()


def test_what_honest_nodes_send_meanwhile_is_not_lost():
    honest = new_key_pair()
    end, public = serve(lambda key: key == honest.public)
    node = NodeSocket(Ticket("127.0.0.1", end.port, bytes(16), public), honest)
    while Link.UP not in node.poll(0.05)[0]:
        end.attend(0.05)
    assert node.send(b"hello")
    prove_closed(end, "127.0.0.1", public)
    arrivals = []
    while not arrivals:
        arrivals = list(end.receive(0.1))
    assert [each.frame for each in arrivals] == [b"hello"]
    node.close()
    end.close()


def test_a_gate_that_fails_says_no_first():
    def broken(key):
        raise RuntimeError("bug")

    end, public = serve(broken)
    stranger = NodeSocket(Ticket("127.0.0.1", end.port, bytes(16), public), new_key_pair())

    def attend():
        for _ in range(3):  # some of them may see the connection alone
            end.attend(10.0)

    with pytest.raises(RuntimeError, match="bug"):
        attend()
    links = []
    while not links:
        links = stranger.poll(0.1)[0]
    assert links[0] is Link.REFUSED
    stranger.close()
    end.close()
