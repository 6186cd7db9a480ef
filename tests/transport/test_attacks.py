"""What strangers and members can do to the coordinator's socket: nothing that grows, and nothing that others notice.

`ZO_ATTACK_FULL=1`, or `make attack`, runs the floods in their full size.
"""

import contextlib
import ctypes
import os
import socket
import threading
import time

import pytest
import zmq

from transport.connections import MOST_OF_A_KEY, MOST_SILENT
from transport.keys import new_key_pair
from transport.sockets import CoordinatorSocket, Link, NodeSocket, Sent
from transport.ticket import Ticket

pytestmark = pytest.mark.attack

FULL = os.environ.get("ZO_ATTACK_FULL") == "1"
RUN = bytes(range(16))
DEADLINE_S = 120.0
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
PLAIN_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
FOUR_GIB = b"\x00\x00\x00\x01\x00\x00\x00\x00"


class Target:
    """A coordinator's socket in a thread, that answers every frame with itself, and an honest node beside it."""

    def __init__(self):
        self.keys = new_key_pair()
        self.honest_keys = new_key_pair()
        self.admitted = {self.honest_keys.public}
        self.end = CoordinatorSocket("127.0.0.1", 0, self.keys, admits=self.admitted.__contains__)
        self.ticket = Ticket("127.0.0.1", self.end.port, RUN, self.keys.public)
        self.arrivals, self.most_connections = [], 0
        self.should_stop = False
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        self.node = NodeSocket(self.ticket, self.honest_keys)
        while Link.UP not in self.node.poll(0.1)[0]:
            pass

    def serve(self):
        while not self.should_stop:
            for arrival in self.end.receive(0.05):
                if arrival.key == self.honest_keys.public:
                    assert self.end.send(arrival.session, arrival.frame) is Sent.OK
                else:
                    self.arrivals.append(arrival)
            self.most_connections = max(self.most_connections, len(self.end._connections))

    def exchange(self, frame=b"ping"):
        """The honest node is answered, whatever others do."""
        assert self.node.send(frame)
        self.wait(lambda: frame in self.node.poll(0.05)[1], "an answer")

    def wait(self, condition, what):
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.thread.is_alive()
            assert time.monotonic() < deadline, f"never {what}"

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.end.port), timeout=DEADLINE_S)

    def member(self):
        """Another node, whose key is admitted."""
        keys = new_key_pair()
        self.admitted.add(keys.public)
        return NodeSocket(self.ticket, keys)

    def close(self):
        self.should_stop = True
        self.thread.join()
        self.node.close()
        self.end.close()


@pytest.fixture
def target():
    target = Target()
    yield target
    target.close()


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def hung_up(connection):
    """Whether the other end closes the connection, whatever it says before."""
    with contextlib.suppress(ConnectionError), connection:
        while connection.recv(65536):
            pass
    return True


def test_an_unknown_key_is_told_no_and_gets_nothing_through(target):
    stranger = NodeSocket(target.ticket, new_key_pair())
    target.wait(lambda: Link.REFUSED in stranger.poll(0.05)[0], "a refusal")
    assert not stranger.send(b"let me in")
    target.exchange()
    assert target.arrivals == []
    stranger.close()


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
def test_a_client_without_curve_gets_nothing_through(target, mechanism):
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    if mechanism == "PLAIN":
        plain.set(zmq.PLAIN_USERNAME, b"node")
        plain.set(zmq.PLAIN_PASSWORD, b"secret")
    monitor = plain.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED)
    plain.connect(target.ticket.endpoint)
    plain.send(b"plain")
    target.wait(lambda: monitor.poll(50), "an end of the connection")
    target.exchange()
    assert target.arrivals == []
    context.destroy(linger=0)


def test_the_right_key_for_another_coordinator_is_no_key(target):
    """Who answers with another key than the ticket's cannot read what the node says."""
    other = CoordinatorSocket("127.0.0.1", 0, new_key_pair())
    node = NodeSocket(Ticket("127.0.0.1", other.port, RUN, target.keys.public), target.honest_keys)
    deadline = time.monotonic() + DEADLINE_S
    links = []
    while not links:
        assert time.monotonic() < deadline
        assert list(other.receive(0.05)) == []
        links = node.poll(0.05)[0]
    assert links[0] is Link.WRONG_KEY
    node.close()
    other.close()


def test_a_stolen_routing_id_is_the_clients_own_affair(target):
    """A routing id proves nothing: whoever claims one speaks for its own key alone."""
    target.exchange()
    stolen = target.end._connections
    ((session, _),) = stolen._by_session.items()
    thief = zmq.Context()
    keys = new_key_pair()
    target.admitted.add(keys.public)
    dealer = thief.socket(zmq.DEALER)
    dealer.set(zmq.ROUTING_ID, b"x" + session[1:])  # libzmq refuses an own id that begins with zero
    for option, value in (
        (zmq.CURVE_SERVERKEY, target.keys.public),
        (zmq.CURVE_PUBLICKEY, keys.public),
        (zmq.CURVE_SECRETKEY, keys.secret),
    ):
        dealer.set(option, zmq.utils.z85.encode(value))
    dealer.connect(target.ticket.endpoint)
    dealer.send(b"it is me")
    target.wait(lambda: target.arrivals, "a frame of the thief")
    assert target.arrivals[0].key == keys.public
    assert target.arrivals[0].session != session
    target.exchange(b"still mine")
    thief.destroy(linger=0)


@pytest.mark.parametrize(
    "opening",
    [
        GREETING + b"\x06" + FOUR_GIB,  # a long command
        GREETING + b"\x02" + FOUR_GIB,  # a long message before the handshake
        PLAIN_GREETING + b"\x06" + FOUR_GIB,
        b"\xff" + FOUR_GIB + b"\x7f",  # the length of the first version's identity
        GREETING + b"\x04\xc8\x05HELLO" + bytes(194),
        GREETING + b"\x04\x0a\x08INITIATE\x00",
        b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
        os.urandom(4096),
    ],
)
def test_nobody_allocates_what_a_stranger_announces(target, opening):
    before = resident_bytes()
    connections = [target.connect() for _ in range(32)]
    for connection in connections:
        with contextlib.suppress(ConnectionError):
            connection.sendall(opening)
            connection.sendall(bytes(64 * 1024))
    target.exchange()
    assert all(map(hung_up, connections))
    assert resident_bytes() - before < 64 * 2**20
    assert target.arrivals == []


@pytest.mark.parametrize("end", ["coordinator", "node"])
def test_nobody_allocates_what_is_announced_after_the_handshake(target, end):
    """Whoever sits on the line may write into it: neither end reads a frame that it would not take."""
    relay = _Valve(target.end.port, 2**40)
    keys = new_key_pair()
    target.admitted.add(keys.public)
    member = NodeSocket(Ticket("127.0.0.1", relay.port, RUN, target.keys.public), keys)
    target.wait(lambda: Link.UP in member.poll(0.05)[0], "a connection")
    before = resident_bytes()
    with contextlib.suppress(ConnectionError):
        (relay.far if end == "coordinator" else relay.near).sendall(b"\x02" + FOUR_GIB + bytes(64 * 1024))
    target.wait(lambda: Link.DOWN in member.poll(0.05)[0], "an end")
    target.exchange()
    assert target.arrivals == []
    assert resident_bytes() - before < 64 * 2**20
    member.close()
    relay.close()


def test_nobody_can_guess_the_next_routing_id():
    """A client that claims it before the server makes it would end the process: libzmq asserts that it is free."""
    rand, first = ctypes.CDLL(None), []
    for _ in range(2):
        rand.srand(1)
        target = Target()
        try:
            target.exchange()
            first += target.end._connections._by_session
        finally:
            target.close()
    assert len(first) == 2
    assert len(set(first)) == 2
    assert bytes.fromhex("006b8b4567") not in first  # the first of `rand()` without a seed


def test_one_key_has_few_connections(target):
    keys = new_key_pair()
    target.admitted.add(keys.public)
    nodes = []
    for number in range(3 * MOST_OF_A_KEY):
        nodes.append(node := NodeSocket(target.ticket, keys))
        target.wait(lambda node=node: Link.UP in node.poll(0.05)[0], "a connection")
        assert node.send(b"%d" % number)
        target.wait(lambda n=number: len(target.arrivals) > n, "a frame")
        for old in nodes[:-MOST_OF_A_KEY]:
            old.close()
        del nodes[:-MOST_OF_A_KEY]
    target.exchange()
    assert len(target.end._connections) <= MOST_OF_A_KEY + 1
    for node in nodes:
        node.close()


def test_a_connection_is_cut_whatever_its_other_end_wants(target):
    member = target.member()
    target.wait(lambda: Link.UP in member.poll(0.05)[0], "a connection")
    assert member.send(b"hello")
    target.wait(lambda: target.arrivals, "a frame")
    target.end.cut(target.arrivals[0].session)
    target.wait(lambda: Link.DOWN in member.poll(0.05)[0], "an end")
    target.exchange()
    member.close()


def test_a_message_of_endless_frames_is_cut_off(target):
    """libzmq keeps all frames of a message until the last has come, however many there are."""
    relay = _Valve(target.end.port, 8 * 2**20)
    keys = new_key_pair()
    target.admitted.add(keys.public)
    member = NodeSocket(Ticket("127.0.0.1", relay.port, RUN, target.keys.public), keys)
    target.wait(lambda: Link.UP in member.poll(0.05)[0], "a connection")
    before = resident_bytes()
    for _ in range(4000):  # 32 MB, of which the relay passes 8 and then waits
        member._dealer.send(bytes(8000), zmq.SNDMORE)
    member._dealer.send(b"end")
    target.wait(lambda: Link.DOWN in member.poll(0.05)[0], "an end")
    target.exchange()
    assert target.arrivals == []
    assert resident_bytes() - before < 96 * 2**20
    member.close()
    relay.close()


class _Valve:
    """Passes bytes on, up to a limit, and then holds the connection open."""

    def __init__(self, port, limit):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.target, self.left = self.listener.getsockname()[1], port, limit
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            self.near, _ = self.listener.accept()
            self.far = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self.copy, args=(self.near, self.far, True), daemon=True).start()
            self.copy(self.far, self.near, False)

    def copy(self, source, target, is_counted):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                self.left -= len(data) if is_counted else 0
                if is_counted and self.left < 0:
                    return
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.close()


def test_half_open_connections_drive_nobody_out(target):
    """Strangers who connect and say nothing: a bounded number of them, and the honest node goes on."""
    number = 10_000 if FULL else 3 * MOST_SILENT // 2
    before = resident_bytes()
    connections = []
    for index in range(number):
        connections.append(target.connect())
        if index % 500 == 0:
            target.exchange(b"%d" % index)
    target.exchange(b"after all")
    target.wait(lambda: len(target.end._connections) <= MOST_SILENT + 1, "fewer connections")
    late = target.member()
    target.wait(lambda: Link.UP in late.poll(0.05)[0], "a handshake of one more node")
    assert target.most_connections <= MOST_SILENT + 1100  # and what came since one look at the events
    assert resident_bytes() - before < 128 * 2**20
    late.close()
    for connection in connections:
        connection.close()


def test_junk_of_a_member_reaches_nobody_else(target):
    """A flood of frames from one node: every frame arrives as its own, none is lost for the honest one."""
    number = 1_000_000 if FULL else 20_000
    before = resident_bytes()

    def flood():
        member = target.member()
        while Link.UP not in member.poll(0.05)[0]:
            pass
        for index in range(number):
            while not member.send(b"junk %d" % index):
                if member.poll(0.01)[0]:
                    break  # cut off, and connected anew
        member.close()

    thread = threading.Thread(target=flood)
    thread.start()
    count = 0
    while thread.is_alive():
        target.exchange(b"%d" % count)
        target.arrivals.clear()
        count += 1
    assert count
    assert resident_bytes() - before < 128 * 2**20
