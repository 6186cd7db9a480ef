"""The node's loop over a socket that plays a part: what ends a node, with which exit code and words."""

import pytest

from node import service
from node.service import NodeError, NodeService
from node.state import StateDirectory
from transport.exits import Exit
from transport.keys import new_key_pair
from transport.messages import PROTOCOL_VERSION, Refuse, decode_from_node, encode
from transport.sockets import Link
from transport.ticket import Ticket


class Socket:
    """Stands for `NodeSocket`: gives what a test wrote down, step by step, and then nothing more."""

    script = ()
    sent = None

    def __init__(self, ticket, keys):
        self.steps = iter(self.script)
        self.is_closed = False

    def poll(self, timeout_s):
        return next(self.steps, ([], []))

    def send(self, frame):
        self.sent.append(decode_from_node(frame))
        return True

    def socket_count(self):
        return None

    def close(self):
        pass


@pytest.fixture
def node(monkeypatch, tmp_path):
    """Runs a node whose socket plays these steps; what it raised."""
    monkeypatch.setattr(service, "NodeSocket", Socket)
    monkeypatch.setattr(Socket, "sent", [])

    def run(*steps, connect_timeout_s=5.0):
        monkeypatch.setattr(Socket, "script", list(steps))
        state = StateDirectory(tmp_path)
        records = []
        with state.lock():
            started = NodeService(
                Ticket("127.0.0.1", 9, bytes(range(16)), new_key_pair().public),
                state,
                "b0" * 16,
                "70" * 16,
                lambda manifest: pytest.fail("nothing was to be loaded"),
                name="ada",
                connect_timeout_s=connect_timeout_s,
                evaluate_every=0,
                show=lambda view: None,
                log=records.append,
            )
            with pytest.raises(NodeError) as raised:
                started.run()
        assert "ended" in records[-1], "the last record counts the bytes, however it ended"
        return raised.value

    return run


def test_it_says_hello_and_ends_with_the_reason_of_a_refusal(node):
    error = node(([Link.UP], []), ([], [encode(Refuse("full", "the run has 4 nodes"))]))
    assert (error.code, str(error)) == (Exit.REFUSED, "the run has 4 nodes")
    hello = Socket.sent[0]
    assert (hello.protocol, hello.run_id, hello.name) == (PROTOCOL_VERSION, bytes(range(16)), "ada")
    assert (hello.base.hex(), hello.tokenizer.hex(), hello.round) == ("b0" * 16, "70" * 16, 0)


@pytest.mark.parametrize("cause", ["base", "tokenizer"])
def test_a_base_that_is_not_the_runs_has_its_own_exit_code(node, cause):
    assert node(([Link.UP], []), ([], [encode(Refuse(cause, "another"))])).code is Exit.BASE


def test_a_coordinator_that_talks_nonsense(node):
    error = node(([Link.UP], []), ([], [b"\xc1"]))
    assert error.code is Exit.REFUSED
    assert "the coordinator sent what this version does not understand" in str(error)


def test_one_wrong_key_may_be_a_coordinator_that_goes_down_three_are_not(node):
    error = node(*[([Link.WRONG_KEY], [])] * 3)
    assert error.code is Exit.WRONG_KEY
    assert "what answers at 127.0.0.1:9 does not have the ticket's key" in str(error)
    error = node(*[([Link.WRONG_KEY], [])] * 2, ([Link.UP], []), ([], [encode(Refuse("full", "full"))]))
    assert error.code is Exit.REFUSED


def test_a_key_that_is_not_admitted(node):
    error = node(*[([Link.REFUSED], [])] * 3)
    assert (error.code, str(error)) == (Exit.REFUSED, "the coordinator does not admit this node's key")


def test_after_a_first_contact_it_never_gives_up(node):
    lost = [([Link.DOWN], []), *[([Link.WRONG_KEY], [])] * 10]
    end = ([Link.UP], []), ([], [encode(Refuse("full", "full"))])
    assert str(node(([Link.UP], []), *lost, *end)) == "full"


def test_nobody_answers(node):
    error = node(connect_timeout_s=0.0)
    assert error.code is Exit.UNREACHABLE
    assert "nobody answers at 127.0.0.1:9" in str(error)
