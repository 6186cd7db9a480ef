"""Processes that need not import anything: they are forked from one that has.

Half of what the end-to-end tests cost was the same modules, imported again by each of some three hundred processes. A
zygote imports them once for each worker of pytest; what it forks is a process like any other, with its own files,
sockets and signals, and a child of the test's, which waits for it. `ZO_TEST_EXEC=1` starts every process anew instead.

    python zygote.py MODULE…        then a line of JSON on standard input for each process
"""

import ctypes
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time

from benchmarks.bandwidth.forks import become

_PR_SET_CHILD_SUBREAPER = 36
LIGHT = ("benchmarks.soak_node", "coordinator.cli", "node.service")
"""What coordinators and light nodes import: nothing of torch."""
HEAVY = (
    "coordinator.cli",
    "node.cli",
    "node.language",
    "node.moves",
    "node.quantization",
    "peft",
    "bitsandbytes",
)


class Forked:
    """A process that a zygote has forked for us, with what is used here of `subprocess.Popen`."""

    def __init__(self, pid):
        self.pid = pid
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        began, pause = time.monotonic(), 0.001
        while self.poll() is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Zygote:
    """One that has imported some modules."""

    def __init__(self, modules, environment):
        # Whom a zygote forks outlives the process in between, and so becomes a child of the nearest subreaper: us.
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "this kernel knows no subreapers; set ZO_TEST_EXEC=1")
        self._popen = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=environment["PYTHONPATH"],
        )

    def fork(self, arguments, stdout_path, stderr_path):
        """Start `python ARGUMENTS`, its output in these files."""
        told = {"arguments": list(map(str, arguments)), "out": str(stdout_path), "err": str(stderr_path)}
        self._popen.stdin.write(json.dumps(told) + "\n")
        self._popen.stdin.flush()
        return Forked(int(self._popen.stdout.readline()))

    def close(self):
        self._popen.stdin.close()
        self._popen.wait()
        self._popen.stdout.close()


def main():
    """Fork a process for every line, and print its number."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    from zo import kernels

    kernels.compile_kernels()
    alive = threading.active_count(), len(os.listdir("/proc/self/task"))
    assert alive == (1, 1), f"{alive} threads: who is forked would lack all but one"
    for line in sys.stdin:
        print(_fork(json.loads(line)), flush=True)


def _fork(told):
    receiver, sender = os.pipe()
    between = os.fork()
    if not between:
        child = os.fork()
        if child:
            os.write(sender, str(child).encode())
            os._exit(0)
        become(lambda: _start(told))
    os.close(sender)
    os.waitpid(between, 0)
    with open(receiver) as file:
        return int(file.read())


def _start(told):
    files = (os.open(os.devnull, os.O_RDONLY), *(_new_file(told[name]) for name in ("out", "err")))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 256)
    _run(told["arguments"])


def _new_file(path):
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)


def _run(arguments):
    if arguments[0] == "-m":
        module = importlib.import_module(arguments[1])
        sys.argv = [module.__file__, *arguments[2:]]
        module.main()
    else:
        sys.argv = list(arguments)
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
