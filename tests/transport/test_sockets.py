"""The two ends over real sockets, CURVE included."""

import contextlib
import os
import select
import socket
import threading
import time

import pytest
import zmq

from transport.keys import new_key_pair
from transport.messages import MAX_NODE_FRAME_BYTES
from transport.meter import zmtp_bytes
from transport.sockets import (
    HEARTBEAT_INTERVAL_MS,
    Arrival,
    CoordinatorSocket,
    Link,
    NodeSocket,
    Sent,
    SocketError,
)
from transport.ticket import Ticket

RUN = bytes(range(16))
DEADLINE_S = 10.0


@pytest.fixture
def keys():
    return new_key_pair()


@pytest.fixture
def coordinator(keys):
    end = CoordinatorSocket("127.0.0.1", 0, keys)
    yield end
    end.close()


def node_for(coordinator, keys, node_keys=None):
    return NodeSocket(Ticket("127.0.0.1", coordinator.port, RUN, keys.public), node_keys or new_key_pair())


def pump(coordinator, node, until):
    """Serve both ends until `until(links, frames, arrivals)` holds; what was seen so far."""
    links, frames, arrivals = [], [], []
    deadline = time.monotonic() + DEADLINE_S
    while not until(links, frames, arrivals):
        assert time.monotonic() < deadline, (links, frames, arrivals)
        new_links, new_frames = node.poll(0.01)
        links += new_links
        frames += new_frames
        arrivals += list(coordinator.receive(0.01)) if coordinator else []
    return links, frames, arrivals


def test_a_frame_arrives_with_the_key_that_the_handshake_proved(coordinator, keys):
    node_keys = new_key_pair()
    node = node_for(coordinator, keys, node_keys)
    links, _, _ = pump(coordinator, node, lambda links, *_: links)
    assert links == [Link.UP]
    assert node.send(b"hello")
    _, _, arrivals = pump(coordinator, node, lambda _l, _f, arrivals: arrivals)
    assert arrivals == [Arrival(arrivals[0].session, node_keys.public, b"hello")]
    assert coordinator.send(arrivals[0].session, b"answer") is Sent.OK
    _, frames, _ = pump(coordinator, node, lambda _l, frames, _a: frames)
    assert frames == [b"answer"]
    node.close()


def test_nodes_of_one_context_are_waited_for_by_their_descriptors(coordinator, keys):
    context = zmq.Context()
    ticket = Ticket("127.0.0.1", coordinator.port, RUN, keys.public)
    nodes = [NodeSocket(ticket, new_key_pair(), context=context) for _ in range(2)]
    found = [[], []]
    arrivals = []
    with select.epoll() as poll:
        for node in nodes:
            for descriptor in node.descriptors:
                poll.register(descriptor, select.EPOLLIN)
        index_by_descriptor = {each: index for index in range(2) for each in nodes[index].descriptors}
        deadline = time.monotonic() + DEADLINE_S
        while not all(b"to" in frame for frame in map(b"".join, found)):
            assert time.monotonic() < deadline, found
            for descriptor, _ in poll.poll(0.01):
                index = index_by_descriptor[descriptor]
                links, frames = nodes[index].poll(0.0)
                found[index] += frames
                if Link.UP in links:
                    assert nodes[index].send(b"from")
            for arrival in coordinator.receive(0.01):
                arrivals.append(arrival.frame)
                assert coordinator.send(arrival.session, b"to") is Sent.OK
    assert arrivals == [b"from", b"from"]
    nodes[0].close()
    assert not context.closed
    assert nodes[1].send(b"still here")
    nodes[1].close()
    context.term()  # returns, since nothing is left open


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="only Linux can be told")
def test_an_answer_of_several_segments_is_not_acknowledged_one_by_one(coordinator, keys):
    node = node_for(coordinator, keys)
    pump(coordinator, node, lambda links, *_: Link.UP in links)
    acknowledges_at_once = (socket.IPPROTO_TCP, socket.TCP_QUICKACK)
    node._connection.setsockopt(*acknowledges_at_once, 1)  # as after a long silence
    assert node.send(b"a report")
    assert node._connection.getsockopt(*acknowledges_at_once) == 0
    node.close()


def test_the_coordinators_kernel_looks_after_connections_that_are_silent_for_long(coordinator, keys):
    node = node_for(coordinator, keys)
    pump(coordinator, node, lambda links, *_: links)
    (descriptor,) = coordinator._connections._open
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) * 1000 > HEARTBEAT_INTERVAL_MS
    node.close()


def test_another_server_key_is_told_apart_from_an_unreachable_coordinator(coordinator, keys):
    stranger = node_for(coordinator, new_key_pair())
    links, _, _ = pump(coordinator, stranger, lambda links, *_: links)
    assert links[0] is Link.WRONG_KEY
    stranger.close()


def test_a_handshake_that_breaks_off_is_one_bad_sign(keys):
    """libzmq tells of it twice; a coordinator that is killed once must not count as two that are not the ticket's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        node = NodeSocket(Ticket("127.0.0.1", server.getsockname()[1], RUN, keys.public), new_key_pair())
        signs = []
        for _ in range(4):
            connection, _ = server.accept()
            connection.close()
            signs += pump(None, node, lambda links, *_: links)[0]
    signs += pump(None, node, lambda links, *_: links)[0]
    assert signs == [Link.WRONG_KEY] * 4 + [Link.NOBODY]
    node.close()


def test_a_key_that_the_gate_does_not_admit_never_gets_a_frame_through(keys):
    end = CoordinatorSocket("127.0.0.1", 0, keys, admits=lambda key: False)
    node = node_for(end, keys)
    _, _, arrivals = pump(end, node, lambda links, *_: links)
    assert not node.send(b"let me in")
    assert arrivals == []
    node.close()
    end.close()


def test_a_plaintext_client_gets_no_frame_through(coordinator):
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.linger = 0
    monitor = plain.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED)
    plain.connect(f"tcp://127.0.0.1:{coordinator.port}")
    plain.send(b"plain")
    deadline = time.monotonic() + DEADLINE_S
    while not monitor.poll(10):
        assert list(coordinator.receive(0.01)) == []
        assert time.monotonic() < deadline
    context.destroy(linger=0)


def test_sending_to_a_session_that_never_was_says_gone(coordinator):
    assert coordinator.send(b"\0nope", b"x") is Sent.GONE


def test_a_frame_over_the_limit_costs_the_sender_its_connection(coordinator, keys):
    node = node_for(coordinator, keys)
    pump(coordinator, node, lambda links, *_: Link.UP in links)
    node.send(bytes(MAX_NODE_FRAME_BYTES))
    _, _, arrivals = pump(coordinator, node, lambda _l, _f, arrivals: arrivals)
    assert [len(a.frame) for a in arrivals] == [MAX_NODE_FRAME_BYTES]
    node.send(bytes(MAX_NODE_FRAME_BYTES + 1))
    _, _, arrivals = pump(coordinator, node, lambda links, *_: Link.DOWN in links)
    assert arrivals == []
    node.close()


def test_a_message_of_several_frames_costs_the_sender_its_connection(coordinator, keys):
    node = node_for(coordinator, keys)
    pump(coordinator, node, lambda links, *_: Link.UP in links)
    node._dealer.send_multipart([b"two", b"frames"])
    node.send(b"behind them")
    _, _, arrivals = pump(coordinator, node, lambda links, *_: links == [Link.DOWN, Link.UP])
    assert arrivals == []
    node.send(b"one")
    _, _, arrivals = pump(coordinator, node, lambda _l, _f, arrivals: arrivals)
    assert [a.frame for a in arrivals] == [b"one"]
    node.close()


def test_a_port_in_use_is_said(coordinator, keys):
    with pytest.raises(SocketError, match=f"127.0.0.1:{coordinator.port} is in use"):
        CoordinatorSocket("127.0.0.1", coordinator.port, keys)


def test_nobody_listening_is_said_until_somebody_does(keys):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    node = NodeSocket(Ticket("127.0.0.1", port, RUN, keys.public), new_key_pair())
    links, frames, _ = pump(None, node, lambda links, *_: links)
    assert (links, frames) == ([Link.NOBODY], [])
    assert not node.send(b"into the void")
    end = CoordinatorSocket("127.0.0.1", port, keys)
    links, _, _ = pump(end, node, lambda links, *_: Link.UP in links)
    assert set(links[:-1]) <= {Link.NOBODY}
    node.close()
    end.close()


@pytest.mark.parametrize("size", [1, 64, 222, 223, 300, 5000])
def test_the_arithmetic_of_zmtp_is_what_the_kernel_counts(coordinator, keys, size):
    node = node_for(coordinator, keys)
    pump(coordinator, node, lambda links, *_: Link.UP in links)
    before = node.socket_count()
    if before is None:
        pytest.skip("this system has no TCP_INFO")
    node.send(bytes(size))
    pump(coordinator, node, lambda _l, _f, arrivals: arrivals)
    assert node.socket_count().bytes_sent - before.bytes_sent == zmtp_bytes(size)
    node.close()


class Relay:
    """Passes bytes between a node and the coordinator; one bit is flipped in the next ones that go down, if told so."""

    def __init__(self, port):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.target, self.num_connections, self.flips = (
            self.listener.getsockname()[1],
            port,
            0,
            False,
        )
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):  # the test is over
            while True:
                near, _ = self.listener.accept()
                self.num_connections += 1
                far = socket.create_connection(("127.0.0.1", self.target))
                for source, target in ((near, far), (far, near)):
                    threading.Thread(
                        target=self.copy, args=(source, target, source is far), daemon=True
                    ).start()

    def copy(self, source, target, is_down):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_down and self.flips:
                    self.flips = False
                    data = data[:-1] + bytes([data[-1] ^ 1])
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def test_one_flipped_bit_does_not_end_a_node(coordinator, keys):
    """libzmq gives an endpoint up for ever after bytes that are not authentic; a node must not."""
    relay = Relay(coordinator.port)
    node = NodeSocket(Ticket("127.0.0.1", relay.port, RUN, keys.public), new_key_pair())
    try:
        pump(coordinator, node, lambda links, frames, arrivals: Link.UP in links)
        assert node.send(b"hello")
        _, _, (arrival,) = pump(coordinator, node, lambda links, frames, arrivals: arrivals)
        relay.flips = True
        assert coordinator.send(arrival.session, b"spoilt on its way") is Sent.OK
        links, frames, _ = pump(coordinator, node, lambda links, frames, arrivals: Link.UP in links)
        assert (links[-2:], frames, relay.num_connections) == ([Link.DOWN, Link.UP], [], 2)
        assert node.send(b"again")
        _, _, arrivals = pump(coordinator, node, lambda links, frames, arrivals: arrivals)
        assert arrivals[0].frame == b"again"
    finally:
        node.close()
        relay.listener.close()


def test_what_is_closed_can_be_closed_again(coordinator, keys):
    node = node_for(coordinator, keys)
    for each in (node, node, coordinator, coordinator):
        each.close()
