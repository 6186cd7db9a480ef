"""The soak's processes: a coordinator and nodes as real as anywhere else, what becomes of them, and what they leave.

Whoever ends in another way than it was made to fails the soak, and so does a Python trace on anybody's stderr. No
process outlives the soak, even if that is killed itself.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from benchmarks import machine
from benchmarks.soak_node import make_base
from coordinator.audit import Audit, audit
from coordinator.ledger import Ledger, LedgerError, StorageError
from coordinator.rundir import RunDirectory
from coordinator.status import Status, read_status
from node import embedded
from node.corpus import pydoc_topics, split_topics
from node.state import StateError, load_result
from transport.ticket import parse_ticket
from zo.commit import Commit, decode_entry

CATCH_UP_S: Final = 180.0
"""How long everyone has to catch up in the end; it takes seconds, unless something is broken."""
_LEAVE_S: Final = 60.0
_START_S: Final = 60.0
_SIGKILLED: Final = frozenset({-signal.SIGKILL})
_LEFT: Final = frozenset({0, -signal.SIGTERM})
"""Before a process has a handler for it, SIGTERM ends it: then there is nothing that could be saved."""
_CAPACITY: Final = 4096
"""New nodes come all the time: enough of them for two days."""
_UNEXPECTED_EVENTS: Final = ("diverged", "misfit", "malformed", "refused", "quarantined")
_PR_SET_PDEATHSIG: Final = 1
_T = TypeVar("_T")


class SoakError(RuntimeError):
    """What the soak was made to find; the message says what, and where to look."""


@dataclass
class Process:
    """A process of ours, and how it may end."""

    name: str
    popen: subprocess.Popen[bytes]
    out_path: Path
    err_path: Path
    may_end_with: frozenset[int] = field(default_factory=frozenset)

    def check(self) -> bool:
        """Whether it has ended, as it may.

        Raises:
            SoakError: in another way, or with a Python trace.
        """
        code = self.popen.poll()
        if code is None:
            return False
        said = self.err_path.read_text("utf-8", errors="replace")
        if code not in self.may_end_with or "Traceback" in said:
            raise SoakError(f"{self.name} ended with exit code {code}: {said[-4000:] or 'no word'}")
        return True

    def end(self, number: signal.Signals, timeout_s: float, may_end_with: frozenset[int]) -> None:
        """Send a signal, and wait for the end. Raises SoakError."""
        self.may_end_with |= may_end_with
        self.popen.send_signal(number)
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise SoakError(f"{self.name} did not end within {timeout_s:.0f} s of {number.name}") from None
        self.check()
        self.forget()

    def forget(self) -> None:
        """Remove what it wrote."""
        for path in (self.out_path, self.err_path):
            path.unlink(missing_ok=True)


class Swarm:
    """One run, its coordinator and its nodes.

    Attributes:
        directory: where everything lies.
        nodes: the processes that run, by place.
        slowdowns: for each start of the coordinator, the time it took as a multiple of its processor time; 1 on a
            machine that has nothing else to do.
    """

    def __init__(self, directory: Path, model: str, num_nodes: int, num_places: int) -> None:
        """Make the run directory.

        Args:
            directory: to be made.
            model: "light" or "demo".
            num_nodes: least number of nodes at any time; a quarter of it is the quorum.
            num_places: greatest number of nodes at one time.

        Raises:
            SoakError: `zo-coordinator init` failed.
        """
        self.directory = directory
        self.run = directory / "run"
        self.nodes: dict[int, Process] = {}
        self.slowdowns: list[float] = []
        self._model = model
        self._num_started = 0
        self._coordinator: Process | None = None
        self._ticket = ""
        self._ledger: Ledger | None = None
        self._libc = ctypes.CDLL(None)
        (directory / "output").mkdir(parents=True)
        base = embedded.path() if model == "demo" else make_base(directory / "base")
        self._base = base
        if model == "demo":
            (directory / "data").mkdir()
            for place, share in enumerate(split_topics(pydoc_topics(), num_places, 0.1)[0]):
                (directory / "data" / f"{place}.txt").write_text("\n\n".join(share.values()), "utf-8")
        options = {
            "--model": base,
            "--rounds": 10_000_000,
            "--directions": 2,
            "--step": 0.001,
            "--full-votes": 1,
            "--train": "B",
            "--digest-every": 16,
            "--staleness": 1,
            "--quorum": max(1, num_nodes // 4),
            "--batch-size": 2,
            "--sequence-length": 64,
            "--host": "127.0.0.1",
            "--port": 0,
        }
        arguments = [str(word) for option in options.items() for word in option]
        made = self._start("init", ["coordinator.cli", "init", str(self.run), *arguments])
        made.may_end_with = frozenset({0})
        made.popen.wait(_START_S)
        made.check()
        self._configure("capacity", _CAPACITY)
        self._directory = RunDirectory(self.run)
        self._manifest = self._directory.manifest()

    @property
    def ticket(self) -> str:
        """What the coordinator printed; empty before it is served."""
        return self._ticket

    @property
    def base(self) -> Path:
        """Directory of the base."""
        return Path(self._base)

    @property
    def coordinator_id(self) -> int:
        """Process number of the coordinator that serves."""
        assert self._coordinator is not None
        return self._coordinator.popen.pid

    # ---- processes --------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Start the coordinator, on the same port as before, and wait until it has a ticket. Raises SoakError."""
        port = parse_ticket(self._ticket).port if self._ticket else 0
        arguments = ["coordinator.cli", "serve", str(self.run), "--port", str(port)]
        began = time.monotonic()
        process = self._coordinator = self._start("coordinator", arguments)
        deadline = began + _START_S
        while "\n" not in (said := process.out_path.read_text("utf-8")):
            if process.check() or time.monotonic() > deadline:
                raise SoakError(f"the coordinator did not start: {process.err_path.read_text('utf-8')}")
            time.sleep(0.005)
        took, processor_s = time.monotonic() - began, _processor_s(process.popen.pid)
        if processor_s:
            self.slowdowns.append(max(1.0, took / processor_s))
        self._ticket = said.splitlines()[0]

    def kill_coordinator(self) -> None:
        """SIGKILL. Raises SoakError."""
        assert self._coordinator is not None
        self._coordinator.end(signal.SIGKILL, _LEAVE_S, _SIGKILLED)

    def stop_coordinator(self) -> None:
        """SIGTERM, and wait until it has stopped in good order. Raises SoakError."""
        assert self._coordinator is not None
        self._coordinator.end(signal.SIGTERM, _LEAVE_S, frozenset({0}))
        self._coordinator = None

    def start_node(self, place: int) -> None:
        """Start the node of a place, once the one before has ended. Raises SoakError."""
        self.wait_for_end(place)
        state = str(self.state(place))
        if self._model == "demo":
            data = str(self.directory / "data" / f"{place}.txt")
            arguments = ["node.cli", "join", self._ticket, "--data", data, "--threads", "1"]
            arguments += ["--name", self.name(place), "--state", state, "--connect-timeout", "120"]
        else:
            arguments = ["benchmarks.soak_node", self._ticket, state, "--base", str(self._base)]
        self.nodes[place] = self._start(self.name(place), arguments)

    def wait_for_end(self, place: int) -> None:
        """Wait until a node that was told to leave has left. Raises SoakError."""
        process = self.nodes.pop(place, None)
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.popen.wait(_LEAVE_S)
        if not process.check():
            self.nodes[place] = process
            raise SoakError(f"{process.name} did not end within {_LEAVE_S:.0f} s of SIGTERM")
        process.forget()

    def kill_node(self, place: int) -> None:
        """SIGKILL, whatever it does just now. Raises SoakError."""
        self.nodes.pop(place).end(signal.SIGKILL, _LEAVE_S, _SIGKILLED)

    def send(self, place: int, number: signal.Signals) -> None:
        """Send a node SIGTERM, SIGSTOP or SIGCONT."""
        process = self.nodes[place]
        if number is signal.SIGTERM:
            process.may_end_with |= _LEFT
        process.popen.send_signal(number)

    def check(self) -> None:
        """Everyone runs who should. Raises SoakError."""
        for process in self.nodes.values():
            process.check()
        if self._coordinator is not None:
            self._coordinator.check()

    def name(self, place: int) -> str:
        """What the node of a place is called."""
        return f"node-{place:02}"

    def state(self, place: int) -> Path:
        """The state directory of the node of a place."""
        return self.directory / "states" / self.name(place)

    def kill_all(self) -> None:
        """Leave no process behind."""
        processes = [*self.nodes.values(), *([self._coordinator] if self._coordinator else [])]
        for process in processes:
            process.popen.kill()
        for process in processes:
            process.popen.wait()
        self._close_ledger()

    def _start(self, name: str, arguments: list[str]) -> Process:
        self._num_started += 1
        stem = self.directory / "output" / f"{name}-{self._num_started}"
        out_path, err_path = stem.with_suffix(".out"), stem.with_suffix(".err")
        environment = {
            **os.environ,
            "PYTHONPATH": str(machine.ROOT),
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with out_path.open("wb") as out, err_path.open("wb") as err:
            popen = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the soak alone, which then ends them all
                preexec_fn=lambda: self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        return Process(name, popen, out_path, err_path)

    # ---- what there is to see ---------------------------------------------------------------------------------------

    def num_commits(self) -> int:
        """Commits in the ledger, read beside the coordinator that writes it."""
        return self._read(Ledger.num_commits)

    def status(self) -> Status:
        """The newest status."""
        return self._read(lambda ledger: read_status(self._manifest, ledger))

    def _read(self, what: Callable[[Ledger], _T]) -> _T:
        for is_last in (False, True):
            try:
                if self._ledger is None:
                    self._ledger = self._directory.ledger(self._manifest, read_only=True)
                return what(self._ledger)
            except (LedgerError, StorageError) as error:
                self._close_ledger()
                if is_last:
                    raise SoakError(f"the ledger cannot be read: {error}") from error
        raise AssertionError

    def _close_ledger(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    # ---- the end ----------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Let no further round close: serve with a quorum that nobody can meet. Raises SoakError."""
        self.stop_coordinator()
        self._configure("quorum", _CAPACITY)
        self.serve()

    def _configure(self, name: str, value: int) -> None:
        path = self.run / "coordinator.toml"
        text = path.read_text("utf-8")
        path.write_text(re.sub(rf"^{name} = \d+", f"{name} = {value}", text, flags=re.MULTILINE), "utf-8")

    def wait_until_level(self) -> int:
        """Wait until every node has said that it has all commits, and return how many. Raises SoakError."""
        names = {self.name(place) for place in self.nodes}
        deadline = time.monotonic() + CATCH_UP_S
        while True:
            self.check()
            total, status = self.num_commits(), self.status()
            level = {m.name for m in status.members if m.presence == "live" and m.round == total}
            if names <= level:
                return total
            if time.monotonic() > deadline:
                behind = {m.name: (m.presence, m.round) for m in status.members if m.name in names - level}
                raise SoakError(
                    f"not level at round {total} after {CATCH_UP_S:.0f} s: {sorted(behind.items())}"
                )
            time.sleep(0.2)

    def prove(self) -> tuple[Audit, int]:
        """One digest everywhere: saved states, the coordinator's replica and a fresh replay; and the samples counted.

        Raises:
            SoakError: it is not one, or a sample was applied twice, or the ledger tells of what must not happen.
        """
        places = sorted(self.nodes)
        for place in places:
            self.nodes[place].may_end_with = frozenset({0})
            self.nodes[place].popen.send_signal(signal.SIGTERM)
        for place in places:
            self.wait_for_end(place)
        self.stop_coordinator()
        status = self.status()
        self._close_ledger()
        with self._directory.ledger(self._manifest, read_only=True) as ledger:
            proof = audit(self._manifest, self._directory.initial(self._manifest), ledger, lambda *_: None)
            num_samples = sum(1 for _ in distinct_samples(ledger))
            for event in ledger.events():
                if event.kind in _UNEXPECTED_EVENTS:
                    raise SoakError(f"round {event.round}: {event.kind}: {event.text}")
        found = {"the coordinator's replica": (status.digest_round, status.digest)}
        paths = {"the run directory": self.run, **{self.name(place): self.state(place) for place in places}}
        for name, path in paths.items():
            try:
                replica = load_result(path)[1]
            except StateError as error:
                raise SoakError(f"{name}: {error}") from error
            found[name] = (replica.round, replica.digest().hex())
        different = {name: each for name, each in found.items() if each != (proof.rounds, proof.digest)}
        if different:
            raise SoakError(
                f"digests differ from the replay's, {proof.digest} at round {proof.rounds}: {different}"
            )
        return proof, num_samples


def _processor_s(pid: int) -> float:
    """The processor time that a process has had so far, in seconds; 0 where the system does not tell."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def distinct_samples(ledger: Ledger) -> Iterator[tuple[int, int]]:
    """(node, round whose samples it measured) of everything in the ledger; late codes are of the round before.

    Raises:
        SoakError: one is there twice.
    """
    recent: dict[int, set[int]] = {}
    for entry in map(decode_entry, ledger.frames()):
        assert isinstance(entry, Commit)
        if len(set(entry.participants)) != len(entry.participants):
            raise SoakError(f"a node is twice in round {entry.round}")
        for node in entry.participants:
            measured = entry.round - (node in entry.late)
            # Codes name at most the round before: two rounds back is all that could be the same.
            seen = recent.setdefault(measured, set())
            if node in seen:
                raise SoakError(
                    f"the samples that node {node} measured in round {measured} were applied twice"
                )
            seen.add(node)
            yield node, measured
        recent.pop(entry.round - 2, None)
