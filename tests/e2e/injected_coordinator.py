"""`zo-coordinator` in a world that is worse than usual: it dies at a chosen write, clocks jump, disks are read-only.

    python injected_coordinator.py die-at=N|clock-jumps|read-only ARGUMENTS OF zo-coordinator

Every write to the disk has boundaries: before it, and after it; for files that are replaced also before and after the
replacement. The process kills itself with SIGKILL at the boundary with the number N, counted from 1. The status, which
is written with the clock, is not counted: then N names a place in what happens, however slow the machine is.
"""

import errno
import os
import random
import signal
import sys
import time

import coordinator.service
import transport.durable
from coordinator.cli import main
from coordinator.ledger import Ledger
from coordinator.snapshots import SnapshotStore


class Boundaries:
    def __init__(self, last):
        self.left = last

    def cross(self, what):
        self.left -= 1
        if self.left == 0:
            print(f"killed {what}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner, name, what):
        function = getattr(owner, name)

        def wrapped(*arguments, **named):
            if "INTO status" in str(what(arguments)):
                return function(*arguments, **named)
            self.cross(f"before {what(arguments)}")
            answer = function(*arguments, **named)
            self.cross(f"after {what(arguments)}")
            return answer

        setattr(owner, name, wrapped)


def die_at(number):
    boundaries = Boundaries(number)
    boundaries.around(Ledger, "_write", lambda arguments: arguments[1])
    boundaries.around(SnapshotStore, "save", lambda arguments: f"the snapshot of round {arguments[1]}")
    boundaries.around(transport.durable.os, "replace", lambda arguments: f"the file {arguments[1]}")
    # Often enough that a short run has some, and not at times that depend on how quick this machine is.
    coordinator.service.SNAPSHOT_CHECK_S = 0.0
    coordinator.service.is_due = lambda num_bytes, tail_bytes, *_: tail_bytes > 150


def jump():
    now, rng = time.time, random.Random(0)
    time.time = lambda: now() + rng.uniform(-1e6, 1e6)


def refuse_writes():
    open_file = os.open

    def refuse(path, flags, *rest, **named):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return open_file(path, flags, *rest, **named)

    os.open = refuse


if __name__ == "__main__":
    faults = sys.argv.pop(1)
    if faults == "clock-jumps":
        jump()
    elif faults == "read-only":
        refuse_writes()
    else:
        die_at(int(faults.partition("=")[2]))
    main()
