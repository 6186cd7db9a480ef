"""A network that corrupts, doubles, loses, reorders, delays and cuts, and what becomes of a run on it: nothing."""

import selectors
import socket
import threading
from contextlib import suppress

import msgspec
import pytest

from transport.ticket import parse_ticket
from zo.commit import decode_entry

pytestmark = pytest.mark.e2e
CHUNK = 4096


class Connection:
    """One connection of a node, and the one to the coordinator that it stands for."""

    def __init__(self, near, far):
        self.near, self.far = near, far
        self.held = {near: b"", far: b""}
        """By the socket to which they should go, bytes that are held back."""


class Proxy:
    """Passes bytes on, until it is told otherwise.

    The next bytes in a direction may be corrupted, doubled or cut off; all bytes may be held back, and let go later.
    """

    def __init__(self, port):
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connections = []
        self.is_holding = False
        self.spoil = {"up": None, "down": None}
        """By direction, what happens to the next bytes: a function from bytes to bytes, or to None to hang up."""
        self.num_spoilt = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.listener, selectors.EVENT_READ)
        self._wake_in, self._wake_out = socket.socketpair()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._orders = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def order(self, function):
        """Do something in the proxy's own thread, and wait until it is done."""
        done = threading.Event()
        self._orders.append((function, done))
        self._wake_in.send(b"!")
        assert done.wait(10)

    def spoil_next(self, direction, function):
        """Let a function change the next bytes that go up or down; None for no bytes hangs up."""
        self.order(lambda: self.spoil.__setitem__(direction, function))

    def hold(self):
        """From now on pass nothing on, without a word to anybody: both ends are half open."""
        self.order(lambda: setattr(self, "is_holding", True))

    def pass_on(self):
        """Pass new connections on again; those from before stay held."""

        def resume():
            self.is_holding = False
            for connection in self.connections:
                connection.is_old = True

        self.order(resume)

    def release_old(self):
        """Let go what was held back of connections from before, upwards, and pass their bytes on again."""

        def release():
            for connection in self.connections:
                if getattr(connection, "is_old", False):
                    connection.is_old = False
                    with suppress(OSError):
                        connection.far.sendall(connection.held[connection.far])

        self.order(release)

    def close(self):
        self._is_closing = True
        self._wake_in.send(b"!")
        self._thread.join(10)

    # ---- the thread ----

    def _loop(self):
        by_socket = {}
        while not self._is_closing:
            for key, _ in self._selector.select(1.0):
                if key.fileobj is self._wake_out:
                    self._wake_out.recv(CHUNK)
                elif key.fileobj is self.listener:
                    self._accept(by_socket)
                elif key.fileobj in by_socket:
                    self._pass(by_socket, key.fileobj)
            while self._orders:
                function, done = self._orders.pop(0)
                function()
                done.set()
        for each in [*by_socket, self.listener, self._wake_in, self._wake_out]:
            each.close()
        self._selector.close()

    def _accept(self, by_socket):
        near, _ = self.listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self.target), timeout=10)
        except OSError:
            near.close()
            return
        connection = Connection(near, far)
        self.connections.append(connection)
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            by_socket[each] = connection
            self._selector.register(each, selectors.EVENT_READ)

    def _pass(self, by_socket, source):
        connection = by_socket[source]
        target = connection.far if source is connection.near else connection.near
        direction = "up" if target is connection.far else "down"
        try:
            data = source.recv(CHUNK)
        except OSError:
            data = b""
        if self.is_holding or getattr(connection, "is_old", False):
            if data:
                connection.held[target] += data
                return
            self._selector.unregister(source)  # the other end does not hear of this end's end
            del by_socket[source]
            return
        if data and self.spoil[direction] is not None:
            function, self.spoil[direction] = self.spoil[direction], None
            data = function(data)
            self.num_spoilt += 1
        if data:
            with suppress(OSError):
                target.sendall(data)
            return
        for each in (source, target):
            if by_socket.pop(each, None) is not None:
                self._selector.unregister(each)
            each.close()


@pytest.fixture
def proxy(swarm):
    """A proxy before the coordinator, made when it is first asked for."""
    made = []

    def make():
        made.append(Proxy(parse_ticket(swarm.ticket).port))
        return made[-1]

    yield make
    for each in made:
        each.close()


def through(swarm, proxy, name, *options):
    """Start a node that reaches the coordinator through a proxy."""
    direct = swarm.ticket
    swarm.ticket = str(msgspec.structs.replace(parse_ticket(direct), port=proxy.port))
    node = swarm.join(name, "--heartbeat-ms", 300, *options)
    swarm.ticket = direct
    return node


def rounds_of(swarm, name):
    """The rounds that a node applied, over all its lives, in order."""
    return [record["round"] for record in swarm.log(name) if "members" in record]


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(flipped, id="corrupted"),
        pytest.param(lambda data: data + data, id="duplicated"),
        pytest.param(lambda data: data[: len(data) // 2], id="lost"),
        pytest.param(lambda data: None, id="cut"),
        pytest.param(lambda data: data[len(data) // 2 :] + data[: len(data) // 2], id="reordered"),
    ],
)
def test_bytes_that_are_not_as_they_were_sent(swarm, proxy, direction, change):
    swarm.init("--quorum", 2).serve()
    between = proxy()
    swarm.join("ada")
    through(swarm, between, "ben")
    swarm.run_until(8)
    between.spoil_next(direction, change)
    swarm.open_until(30)  # with a quorum of 2 nothing goes on without ben
    swarm.assert_finished("ada", "ben")
    assert between.num_spoilt == 1
    assert len(between.connections) > 1, "what cannot be authentic ends the connection"
    assert rounds_of(swarm, "ben") == list(range(30))
    assert swarm.status().malformed_frames == 0


def test_a_connection_that_is_half_open(swarm, proxy):
    """The network is gone, and neither end hears of it: both notice by themselves, and the others go on meanwhile."""
    swarm.init("--quorum", 1, rounds=40).serve()
    between = proxy()
    swarm.join("ada")
    through(swarm, between, "ben")
    swarm.poll_members("ada", "ben")
    swarm.run_until(8)
    between.hold()
    swarm.run_until(20)
    swarm.poll(lambda: len(between.connections) > 1, "an attempt to reconnect")
    between.pass_on()
    ben = swarm.member("ben").node
    swarm.poll(
        lambda: len([e for e in swarm.events("joined") if e.node == ben]) > 1 or replaced(swarm), "ben again"
    )
    swarm.open_until(40)
    swarm.assert_finished("ada", "ben")
    assert rounds_of(swarm, "ben") == list(range(40))


def replaced(swarm):
    return swarm.events("replaced")


def test_bytes_of_an_old_connection_that_come_after_those_of_the_new_one(swarm, proxy):
    """Delayed and reordered across connections: a report of the old session, long after the new one has begun."""
    swarm.init("--quorum", 2, rounds=40).serve()
    between = proxy()
    swarm.join("ada")
    through(swarm, between, "ben")
    swarm.run_until(8)
    old = between.connections[-1]  # the one before it served to enrol ben's key
    between.hold()
    swarm.open_until(9)
    # Ben's report of round 8 and its first heartbeats are held back; then it gives the connection up.
    swarm.poll(lambda: between.connections[-1] is not old, "an attempt to reconnect")
    assert old.held[old.far]
    between.pass_on()
    swarm.run_until(16)
    between.release_old()
    swarm.open_until(40)
    swarm.assert_finished("ada", "ben")
    assert rounds_of(swarm, "ben") == list(range(40))
    for entry in map(decode_entry, swarm.commits()):
        assert entry.participants == (0, 1)
