"""`zo-coordinator` in a world that is worse than usual: clocks jump, disks are read-only.

python injected_coordinator.py clock-jumps|read-only ARGUMENTS OF zo-coordinator
"""

import errno
import os
import random
import sys
import time

from coordinator.cli import main


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
    main()
