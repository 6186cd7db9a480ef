"""Where the suite's processes run: two network namespaces of its own and a wire between them, or loopback.

Nothing in a namespace can reach an address outside of it: it has one interface, one network of two addresses, and no
route. Both go when the suite ends, also after Ctrl-C; those of a suite that was killed go when the next one starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks import machine

PREFIX: Final = "zo-bench"
COORDINATOR_ADDRESS: Final = "10.231.77.1"
NODES_ADDRESS: Final = "10.231.77.2"
_MAC_BY_SIDE: Final = {"coordinator": "02:00:00:00:77:01", "nodes": "02:00:00:00:77:02"}
_NAMESPACES: Final = Path("/run/netns")
_PR_SET_PDEATHSIG: Final = 1
_STOP_S: Final = 5.0

Side = Literal["coordinator", "nodes"]


class NetworkError(RuntimeError):
    """The network of a benchmark cannot be made or used; the message says why and what would help."""


@dataclass(frozen=True)
class Interface:
    """What an interface has carried, seen from the nodes."""

    up_bytes: int
    """Ethernet bytes sent: frames without preamble and checksum."""
    down_bytes: int
    up_frames: int
    down_frames: int

    def __sub__(self, other: Interface) -> Interface:
        return Interface(
            self.up_bytes - other.up_bytes,
            self.down_bytes - other.down_bytes,
            self.up_frames - other.up_frames,
            self.down_frames - other.down_frames,
        )


class Network:
    """Two sides, processes on them, and all of it gone at the end.

    Attributes:
        label: how bytes are counted here, in words.
        interface: the nodes' end of the wire by name; None on the loopback interface.
    """

    def __init__(self, namespaces: tuple[str, str] | None, reason: str = "") -> None:
        self._namespace_by_side = dict(zip(("coordinator", "nodes"), namespaces or (), strict=False))
        self._children: list[subprocess.Popen[str]] = []
        self.interface = "wire" if namespaces else None
        self.label = (
            "network namespaces, counted by the interface"
            if namespaces
            else f"LOOPBACK, counted by TCP_INFO: {reason}"
        )

    @property
    def coordinator_address(self) -> str:
        """Where nodes find the coordinator."""
        return COORDINATOR_ADDRESS if self.interface else "127.0.0.1"

    @property
    def nodes_address(self) -> str:
        """Where the coordinator's side finds the nodes'."""
        return NODES_ADDRESS if self.interface else "127.0.0.1"

    def start(
        self,
        side: Side | None,
        arguments: Sequence[str],
        *,
        errors: Path,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """A process on a side, spoken to through pipes; it ends with this one, however this one ends.

        Args:
            side: of the wire; None for neither, where this process is.
            arguments: the command line.
            errors: file that its standard error is added to.
            environment: more variables.
        """
        with errors.open("a") as sink:
            child = subprocess.Popen(
                [*self._inside(side), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                cwd=machine.ROOT,
                env=quiet_environment() | (environment or {}),
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def python(self, side: Side, module: str, *arguments: str, errors: Path) -> subprocess.Popen[str]:
        """A module of this project as a process on a side."""
        return self.start(side, [sys.executable, "-m", module, *arguments], errors=errors)

    def count(self, *, among_nodes: bool = False) -> Interface | None:
        """What the wire has carried so far, for all nodes together; None on the loopback interface.

        Args:
            among_nodes: what nodes have sent each other instead, over their side's loopback interface.
        """
        if self.interface is None:
            return None
        name = "lo" if among_nodes else self.interface
        command = ["ip", "-n", self._namespace_by_side["nodes"], "-s", "-j", "link", "show", name]
        (found,) = json.loads(_run(command))
        sent, received = found["stats64"]["tx"], found["stats64"]["rx"]
        return Interface(sent["bytes"], received["bytes"], sent["packets"], received["packets"])

    @contextlib.contextmanager
    def emulated(
        self, bits_per_s: float, delay_s: float, loss: float, seed: int, errors: Path
    ) -> Iterator[None]:
        """Another wire while the context lasts, on which every connection has a link of its own; see `emulator`.

        Raises:
            NetworkError: it cannot be made.
        """
        names = (self._namespace_by_side["coordinator"], self._namespace_by_side["nodes"])
        for name in names:  # a veth takes its other end along
            _run(["ip", "-n", name, "link", "del", "wire"], optional=True)
        way = [str(each) for each in (bits_per_s, delay_s, loss, seed)]
        module = [sys.executable, "-m", "benchmarks.bandwidth.emulator", *names, *way]
        child = self.start(None, module, errors=errors)
        try:
            assert child.stdout is not None
            if not child.stdout.readline():
                raise NetworkError(f"no link can be emulated here: {errors.read_text().strip()[-300:]}")
            _dress(names)
            yield
        finally:
            self.stop(child)

    def stop(self, child: subprocess.Popen[str]) -> int:
        """End a process in good order, or else at once, and whatever it started; its exit status."""
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # its session is its own
        if child in self._children:
            self._children.remove(child)
        return child.returncode

    def close(self) -> None:
        """End all processes; take the namespaces away."""
        for child in list(self._children):
            child.kill()
            self.stop(child)
        for name in self._namespace_by_side.values():
            for process in _run(["ip", "netns", "pids", name], optional=True).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            _delete(name)

    def _inside(self, side: Side | None) -> list[str]:
        return ["ip", "netns", "exec", self._namespace_by_side[side]] if self.interface and side else []


@contextlib.contextmanager
def network(*, loopback: bool = False) -> Iterator[Network]:
    """A network of its own while the context lasts; on the loopback interface where that is not allowed, or wanted."""
    sweep()
    made = Network(None, "as asked for") if loopback else _make()
    try:
        with _interruptible():
            yield made
    finally:
        with _undisturbed():
            made.close()


def sweep() -> list[str]:
    """Take away what suites have left that were killed; the names of those namespaces."""
    left = []
    for path in sorted(_NAMESPACES.glob(f"{PREFIX}-*-*")) if _NAMESPACES.is_dir() else []:
        owner = path.name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _delete(path.name)
            left.append(path.name)
    return left


def unavailable() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root; run it with sudo"
    if shutil.which("ip") is None:
        return "there is no `ip` command; install iproute2"
    return ""


def quiet_environment() -> dict[str, str]:
    """The environment of children: one thread each, no GPU, this tree's modules, nothing fetched.

    All systems compute on the same processor; and CUDA does not survive a fork.
    """
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "PYTHONPATH": str(machine.ROOT),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "400",
    }


def _make() -> Network:
    reason = unavailable()
    if reason:
        return Network(None, reason)
    names = (f"{PREFIX}-{os.getpid()}-c", f"{PREFIX}-{os.getpid()}-n")
    try:
        for name in names:
            _run(["ip", "netns", "add", name])
        _run(
            [
                "ip",
                "link",
                "add",
                "wire",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                "wire",
                "netns",
                names[1],
            ]
        )
        _dress(names)
    except NetworkError as error:
        for name in names:
            _delete(name)
        return Network(None, str(error))
    return Network(names)


def _dress(names: tuple[str, str]) -> None:
    """Give the two ends of the wire their addresses. Raises NetworkError."""
    addresses, hardware = (COORDINATOR_ADDRESS, NODES_ADDRESS), tuple(_MAC_BY_SIDE.values())
    for name, own, other, own_mac, other_mac in zip(
        names, addresses, addresses[::-1], hardware, hardware[::-1], strict=True
    ):
        inside = ["ip", "-n", name]
        _run([*inside, "link", "set", "wire", "address", own_mac])
        # Else the kernel hands over several segments as one, and counts the headers of one.
        _run([*inside, "link", "set", "wire", "gso_max_segs", "1"])
        # No router solicitations, no neighbour discovery, no ARP: what is counted is the connections.
        quiet = ["ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"]
        _run(quiet, optional=True)
        _run([*inside, "addr", "add", f"{own}/30", "dev", "wire"])
        # What nodes send each other is to have the frames of an Ethernet, too.
        _run([*inside, "link", "set", "lo", "mtu", "1500"])
        _run([*inside, "link", "set", "lo", "gso_max_segs", "1"])
        _run([*inside, "link", "set", "lo", "up"])
        _run([*inside, "link", "set", "wire", "up"])
        neighbour = ["neigh", "replace", other, "lladdr", other_mac, "dev", "wire", "nud", "permanent"]
        _run([*inside, *neighbour])


def _run(command: Sequence[str], *, optional: bool = False) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NetworkError(f"cannot run {command[0]}: {error}") from error
    if done.returncode and not optional:
        raise NetworkError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def _delete(name: str) -> None:
    if (_NAMESPACES / name).exists():
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that was."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the suite as Ctrl-C does: everything is cleaned up."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not stop the cleaning up."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
