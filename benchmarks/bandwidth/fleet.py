"""Many light nodes in one thread: waits for all their sockets at once, and turns those for which something is due.

One context of libzmq has the sockets of all, so there are two threads in all, however many nodes.
"""

from __future__ import annotations

import heapq
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import zmq

from benchmarks.bandwidth.light import LightNode

_SOCKETS_OF_A_NODE: Final = 3
"""A DEALER, and two ends of what libzmq says of its connection."""
_SPARE: Final = 64

Make = Callable[["zmq.Context[zmq.Socket[bytes]]"], LightNode]


class Fleet(threading.Thread):
    """Nodes that take part, from `start` until `leave`.

    Attributes:
        nodes: those that have been started, for reading.
    """

    def __init__(self, makers: Sequence[Make], gap_s: float = 0.0) -> None:
        """Prepare.

        Args:
            makers: one for each node, called in the fleet's thread.
            gap_s: between the starts of two nodes, in seconds.
        """
        super().__init__(daemon=True)
        self.nodes: list[LightNode] = []
        self._makers, self._gap_s = makers, gap_s
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._is_leaving = False
        self._failure: str | None = None

    @property
    def size(self) -> int:
        """Nodes that there are to be."""
        return len(self._makers)

    @property
    def failure(self) -> str | None:
        """Why nodes are missing, in words."""
        ended = next((node.ended for node in list(self.nodes) if node.ended is not None), None)
        return self._failure or ended

    def wake(self) -> None:
        """Have every node turned: its pace may be known by now."""
        os.eventfd_write(self._bell, 1)

    def leave(self) -> None:
        """Have all nodes say goodbye, soon; `join` waits for it."""
        self._is_leaving = True
        self.wake()

    def run(self) -> None:
        """Take part."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.set(zmq.MAX_SOCKETS, _SOCKETS_OF_A_NODE * self.size + _SPARE)
        try:
            with select.epoll() as poll:
                poll.register(self._bell, select.EPOLLIN)
                self._take_part(poll, context)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            for node in self.nodes:
                node.leave()
            context.term()

    def _take_part(self, poll: select.epoll, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        node_by_descriptor: dict[int, int] = {}
        watched: list[tuple[int, ...]] = []
        due: list[float] = []
        queue: list[tuple[float, int]] = []
        start_at = time.monotonic()

        def turn(index: int) -> None:
            node = self.nodes[index]
            due[index] = node.turn()
            if due[index] != float("inf"):
                heapq.heappush(queue, (due[index], index))
            now = () if node.ended is not None else node.descriptors
            if now is not watched[index]:
                for descriptor in watched[index]:
                    if node_by_descriptor.get(descriptor) == index:
                        del node_by_descriptor[descriptor]
                for descriptor in now:
                    node_by_descriptor[descriptor] = index
                    poll.register(descriptor, select.EPOLLIN)
                watched[index] = now

        while not self._is_leaving:
            now = time.monotonic()
            if len(self.nodes) < self.size and now >= start_at:
                self.nodes.append(self._makers[len(self.nodes)](context))
                watched.append(())
                due.append(0.0)
                start_at = now + self._gap_s
                turn(len(self.nodes) - 1)
            while queue and queue[0][0] <= now:
                at, index = heapq.heappop(queue)
                if due[index] == at:
                    turn(index)
            until = queue[0][0] if queue else now + 1.0
            if len(self.nodes) < self.size:
                until = min(until, start_at)
            ready = poll.poll(max(0.0, until - time.monotonic()), 1024)
            if any(descriptor == self._bell for descriptor, _ in ready):
                os.eventfd_read(self._bell)
                for index in range(len(self.nodes)):
                    turn(index)
                continue
            for found in dict.fromkeys(node_by_descriptor.get(descriptor) for descriptor, _ in ready):
                if found is not None:
                    turn(found)
