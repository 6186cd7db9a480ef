"""Several processes of one program, forked from one that has imported it: what they do, they do as if started alone.

    python -m benchmarks.bandwidth.forks MODULE[,MODULE…]

The first module's `main` is run; the others are imported beforehand. A line of JSON on standard input has everybody's
arguments. Importing torch takes longer than a round does, and eight nodes on two cores would do nothing else for
minutes. Ends with 0 when all have, and with another status as soon as one has another.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.bandwidth.network import Network, Side, die_with_parent


def start(
    network: Network, side: Side, modules: Sequence[str], arguments: Sequence[Sequence[str]], errors: Path
) -> subprocess.Popen[str]:
    """As many processes as there are lists of arguments, on a side of the network; the one that stands for all.

    Args:
        network: to run on.
        side: of it.
        modules: whose `main` is run, and what else to import first.
        arguments: of each process.
        errors: file for what they say.
    """
    child = network.python(side, "benchmarks.bandwidth.forks", ",".join(modules), errors=errors)
    assert child.stdin is not None
    child.stdin.write(json.dumps([list(each) for each in arguments]) + "\n")
    child.stdin.flush()
    return child


def main() -> int:
    """Fork, and wait."""
    modules = [importlib.import_module(name) for name in sys.argv[1].split(",")]
    children = [_fork(modules[0], each) for each in json.loads(sys.stdin.readline())]
    left = len(children)
    while left:
        _, status = os.wait()
        left -= 1
        if status:
            for child in children:
                _kill(child)
            return 1
    return 0


def _fork(module: Any, arguments: Sequence[str]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        become(lambda: _run(module, arguments))
    return child


def _run(module: Any, arguments: Sequence[str]) -> int | None:
    die_with_parent()
    sys.argv = [module.__name__, *arguments]
    status: int | None = module.main()
    return status


def become(run: Callable[[], int | None]) -> NoReturn:
    """What an interpreter does with a program, in a process that was forked for it: this does not return.

    Args:
        run: the program; its exit status, or None for 0.
    """
    status = 1
    try:
        status = int(run() or 0)
    except SystemExit as error:
        if not (error.code is None or isinstance(error.code, int)):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main())
