"""A swarm of processes for one test: it starts them, looks at what they wrote, and leaves none behind."""

import atexit
import functools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.audit import audit
from coordinator.cli import app
from coordinator.rundir import RunDirectory
from coordinator.status import read_status
from node.state import load_result
from tests.e2e.zygote import HEAVY, LIGHT, Zygote
from transport.keys import new_key_pair
from transport.ticket import parse_ticket
from zo import kernels

ROOT = Path(__file__).parents[2]
LIGHT_NODE = Path(__file__).with_name("light_node.py")
DEADLINE_S = 120.0
"""Long, since it only ever passes when something is broken."""


def environment():
    """Of all processes of ours."""
    ours = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **ours}


@functools.cache
def zygote(modules):
    """The one that has imported these modules; it ends with this process."""
    started = Zygote(modules, environment())
    atexit.register(started.close)
    return started


class Process:
    """A process of ours, its output in files."""

    def __init__(self, arguments, directory, name, **options):
        self.name = name
        self.stdout_path, self.stderr_path = directory / f"{name}.out", directory / f"{name}.err"
        if not options and "ZO_TEST_EXEC" not in os.environ:
            modules = HEAVY if "node.cli" in arguments else LIGHT
            self.popen = zygote(modules).fork(arguments, self.stdout_path, self.stderr_path)
            return
        with self.stdout_path.open("wb") as out, self.stderr_path.open("wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=environment(),
                **options,
            )

    def send(self, number):
        self.popen.send_signal(number)

    def wait(self, timeout_s=DEADLINE_S):
        return self.popen.wait(timeout=timeout_s)

    def kill(self):
        """SIGKILL, and wait until it is gone."""
        self.popen.kill()
        self.popen.wait()

    @property
    def is_running(self):
        return self.popen.poll() is None

    @property
    def out(self):
        return self.stdout_path.read_text("utf-8")

    @property
    def err(self):
        return self.stderr_path.read_text("utf-8")

    def __repr__(self):
        return f"<{self.name} exit {self.popen.poll()}\n{self.out}\n{self.err}>"


def poll(condition, what, witnesses):
    """Wait until `condition()` is true, and return it; fail with what the witnesses wrote if it never is."""
    began = time.monotonic()
    while not (answer := condition()):
        waited = time.monotonic() - began
        if waited > DEADLINE_S:
            pytest.fail(f"never {what}: {witnesses}")
        time.sleep(min(0.01 + waited / 50, 0.1))  # to look costs time that those who are waited for need
    return answer


class Swarm:
    """One run directory, its coordinator and its nodes."""

    def __init__(self, directory, base):
        self.directory = directory
        self.base = base
        self.run = directory / "run"
        self.gate = directory / "gate"
        self.processes = []
        self.coordinator = None
        self.ticket = None
        self.nodes = {}
        self.open_until(0)

    # ---- processes ----

    def start(self, name, *arguments, **options):
        count = sum(process.name.startswith(name) for process in self.processes)
        process = Process(arguments, self.directory, f"{name}-{count}", **options)
        self.processes.append(process)
        return process

    def command(self, *arguments, timeout_s=DEADLINE_S):
        """Run a command of ours to its end."""
        process = self.start("command", "-m", *arguments)
        process.wait(timeout_s)
        return process

    def init(self, *options, rounds=30):
        """Make the run directory, in this process."""
        fixed = (
            "--model",
            self.base,
            "--rounds",
            rounds,
            "--directions",
            2,
            "--digest-every",
            4,
            "--train",
            "B",
        )
        arguments = ["init", self.run, *fixed, "--host", "127.0.0.1", *options]
        made = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert made.exit_code == 0, made.output
        return self

    def serve(self, *options, entry=("-m", "coordinator.cli"), **popen_options):
        """Start serving, on the same port as before, and wait for the ticket."""
        port = parse_ticket(self.ticket).port if self.ticket else 0
        options = ("serve", self.run, "--port", port, *options)
        process = self.coordinator = self.start("coordinator", *entry, *options, **popen_options)
        self.poll(lambda: "\n" in process.out, "a ticket")
        self.ticket = process.out.splitlines()[0]
        return process

    def join(self, name, *options, state=None, base=None):
        """Start a light node."""
        arguments = (LIGHT_NODE, self.ticket, state or self.state(name), "--base", base or self.base)
        self.nodes[name] = self.start(name, *arguments, "--gate", self.gate, *options)
        return self.nodes[name]

    def clean_up(self):
        for process in self.processes:
            if process.is_running:
                process.send(signal.SIGCONT)
                process.kill()

    def admitted_keys(self):
        """New keys that may join."""
        keys = new_key_pair()
        with RunDirectory(self.run).keyring() as keyring:
            keyring.allow(keys.public)
        return keys

    # ---- pace ----

    def open_until(self, round):
        """Let light nodes probe all rounds below `round`."""
        new = self.gate.with_suffix(".new")
        new.write_text(str(round))
        os.replace(new, self.gate)

    def run_until(self, round):
        """Let the swarm make commits until there are `round` of them, and stop there."""
        self.open_until(round)
        status = self.poll_status(lambda status: status.round >= round, f"round {round}")
        assert status.round == round

    # ---- what there is to see ----

    def state(self, name):
        return self.directory / "states" / name

    def status(self):
        directory = RunDirectory(self.run)
        manifest = directory.manifest()
        with directory.ledger(manifest, read_only=True) as ledger:
            return read_status(manifest, ledger)

    def member(self, name):
        """What the status says of one node."""
        return next((member for member in self.status().members if member.name == name), None)

    def poll_members(self, *names):
        """Wait until these nodes have joined."""
        wanted = set(names)
        self.poll_status(
            lambda s: wanted <= {m.name for m in s.members if m.presence != "gone"}, f"{names} as members"
        )

    def poll(self, condition, what):
        """Wait for anything; no longer once the coordinator has failed."""

        def answer():
            assert self.coordinator is None or self.coordinator.popen.poll() in (None, 0), self.processes
            return condition()

        return poll(answer, what, self.processes)

    def poll_status(self, condition, what):
        """Wait for a status of which `condition` holds."""

        def matching():
            status = self.status()
            return status if condition(status) else None

        return self.poll(matching, what)

    def events(self, kind=None):
        directory = RunDirectory(self.run)
        with directory.ledger(directory.manifest(), read_only=True) as ledger:
            return [event for event in ledger.events(1000) if kind in (None, event.kind)]

    def commits(self):
        directory = RunDirectory(self.run)
        with directory.ledger(directory.manifest(), read_only=True) as ledger:
            return list(ledger.frames())

    def audit(self):
        """Replay the ledger in this process."""
        directory = RunDirectory(self.run)
        manifest = directory.manifest()
        with directory.ledger(manifest, read_only=True) as ledger:
            return audit(manifest, directory.initial(manifest), ledger, lambda done, total: None)

    def log(self, name):
        """The records that a node wrote."""
        return [json.loads(line) for line in (self.state(name) / "log.jsonl").read_text().splitlines()]

    def assert_finished(self, *names):
        """Everything ended well, and everyone has the weights that a fresh replay of the ledger has."""
        for name in names:
            assert self.nodes[name].wait() == 0, self.nodes[name]
        assert self.coordinator.wait() == 0, self.coordinator
        proof = self.audit()
        assert proof.rounds == RunDirectory(self.run).manifest().run.rounds
        for path in [self.run, *map(self.state, names)]:
            replica = load_result(path)[1]
            assert (path.name, replica.round, replica.digest().hex()) == (
                path.name,
                proof.rounds,
                proof.digest,
            )
        for process in self.processes:
            assert "Traceback" not in process.err, process
        return proof


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A directory with the files of a base that nobody could load, but of which everybody can take the digest."""
    directory = tmp_path_factory.mktemp("base") / "made-up"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "made-up"}')
    (directory / "tokenizer.json").write_text("{}")
    shape = (64, 64)
    names = [f"layers.0.self_attn.{name}.weight" for name in ("q_proj", "v_proj")]
    size = 4 * shape[0] * shape[1]
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    encoded = json.dumps(header).encode()
    tensors = np.zeros(len(names) * shape[0] * shape[1], "<f4").tobytes()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + tensors)
    return directory


@pytest.fixture
def new_swarm(tmp_path, base):
    """Makes swarms; all their processes end with the test."""
    kernels.compile_kernels()  # once here, not in every process at once
    swarms = []

    def make(name="swarm"):
        directory = tmp_path / name
        directory.mkdir()
        swarms.append(Swarm(directory, base))
        return swarms[-1]

    yield make
    for swarm in swarms:
        swarm.clean_up()


@pytest.fixture
def swarm(new_swarm):
    return new_swarm()


@pytest.fixture(scope="session")
def says():
    """Checks that a command failed as documented: its exit code, and one line on stderr that holds these words."""

    def check(process, code, *words):
        assert process.wait() == code, process
        lines = [line for line in process.err.splitlines() if "error: " in line]
        assert len(lines) == 1, process
        for word in words:
            assert re.search(word, lines[0]), (word, lines[0])
        assert "Traceback" not in process.err, process

    return check
