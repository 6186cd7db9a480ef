"""A thin, slow, lossy link in user space: two virtual Ethernet cards (TAP devices) and a queue between them, each way.

    python -m benchmarks.bandwidth.emulator NAMESPACE_A NAMESPACE_B BITS_PER_S DELAY_S LOSS SEED

Every connection has a link of its own, told apart by its TCP port, so that one process stands for many nodes' links.
The kernels' TCP meets them as it would meet real ones: frames wait, come late, and some never do.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Final

_CLONE_NEWNET: Final = 0x4000_0000
_TUNSETIFF: Final = 0x4004_54CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_LONGEST_FRAME: Final = 2048
QUEUE_BYTES: Final = 32 * 1024
"""What waits at a link at most; further frames are dropped, as a router does."""


@dataclass
class Link:
    """One connection's link in one direction: when each frame comes out. Pure: the time is an argument."""

    bits_per_s: float
    delay_s: float
    loss: float
    rng: random.Random = field(default_factory=random.Random)
    free_at: float = 0.0

    def passes(self, num_bytes: int, now: float) -> float | None:
        """When a frame of so many bytes that comes now is out at the other end; None if it is lost.

        A frame that is lost on the way has taken its time on the link; one that finds the queue full has not.
        """
        waiting_bytes = max(0.0, self.free_at - now) * self.bits_per_s / 8
        if waiting_bytes + num_bytes > max(QUEUE_BYTES, num_bytes):
            return None
        self.free_at = max(now, self.free_at) + 8 * num_bytes / self.bits_per_s
        return None if self.rng.random() < self.loss else self.free_at + self.delay_s


def port_of(frame: bytes, *, of_source: bool) -> int:
    """The TCP port at the nodes' end of an Ethernet frame; 0 if it holds no TCP over IPv4."""
    if len(frame) < 38 or frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return 0
    begin = 14 + 4 * (frame[14] & 15) + (0 if of_source else 2)
    return int.from_bytes(frame[begin : begin + 2], "big")


def _card(namespace: str) -> int:
    """A new TAP device `wire` in a namespace, which this thread enters; its file descriptor."""
    inside = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(inside, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    finally:
        os.close(inside)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TAP | _IFF_NO_PI))
    return descriptor


def main() -> int:
    """Pass frames on until killed."""
    coordinator, nodes = (_card(name) for name in sys.argv[1:3])
    bits_per_s, delay_s, loss = map(float, sys.argv[3:6])
    seeds = random.Random(int(sys.argv[6]))
    links: dict[tuple[int, int], Link] = {}
    on_the_way: list[tuple[float, int, int, bytes]] = []
    count = 0
    print("ready", flush=True)
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        ready, _, _ = select.select([coordinator, nodes], [], [], wait)
        for source in ready:
            try:
                frame = os.read(source, _LONGEST_FRAME)
            except OSError:  # nothing there after all, or the card is down yet
                continue
            now = time.monotonic()
            key = source, port_of(frame, of_source=source == nodes)
            link = links.get(key)
            if link is None:
                link = links[key] = Link(bits_per_s, delay_s, loss, random.Random(seeds.random()))
            arrives = link.passes(len(frame), now)
            if arrives is not None:
                count += 1
                sink = coordinator if source == nodes else nodes
                heapq.heappush(on_the_way, (arrives, count, sink, frame))
        now = time.monotonic()
        while on_the_way and on_the_way[0][0] <= now:
            _, _, sink, frame = heapq.heappop(on_the_way)
            try:
                os.write(sink, frame)
            except OSError:  # down
                continue


if __name__ == "__main__":
    sys.exit(main())
