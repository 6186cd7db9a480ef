"""The soak in its short form, and what it relies on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.soak import Watch
from benchmarks.soak_schedule import Kind, num_places, schedule
from benchmarks.soak_swarm import Process, SoakError, distinct_samples
from zo.commit import Commit

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_a_minute_of_kills_joins_and_stops_ends_with_one_digest():
    command = ["-m", "benchmarks.soak", "--model", "light", "--seconds", "60", "--nodes", "16", "--json"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr
    (part,) = json.loads(done.stdout)["parts"]
    assert part["rounds"] > 20, part
    assert part["longest_stall_s"] < 30 * part["slowdown"], "30 s on a machine that has nothing else to do"
    assert part["equal_states"] == num_places(16) + 2
    assert part["survived"][Kind.KILL_COORDINATOR.value] >= 2
    assert part["survived"][Kind.KILL.value] >= 5
    assert part["samples_applied_once"] > part["rounds"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_process_outlives_the_soak(tmp_path, number, code):
    command = ["-m", "benchmarks.soak", "--model", "light", "--seconds", "600", "--nodes", "2", "--seed", "5"]
    said = tmp_path / "said"
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stderr=file, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
    try:
        poll(lambda: b"left" in said.read_bytes(), process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 3, "a coordinator and two nodes"
        process.send_signal(number)
        assert process.wait(60) == code
        poll(lambda: not any(is_alive(child) for child in children), process)
        assert number == signal.SIGKILL or b"stopped; --seed 5" in said.read_bytes()
    finally:
        process.kill()
        process.wait()


def is_alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def poll(condition, process):
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None or time.monotonic() < deadline, process
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_seed_names_a_schedule():
    plan = list(schedule(7, 16, 300, 1.0, 20.0))
    assert plan == list(schedule(7, 16, 300, 1.0, 20.0))
    assert plan != list(schedule(8, 16, 300, 1.0, 20.0))
    assert {happening.kind for happening in plan} == set(Kind)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_nodes", [1, 4, 16])
def test_the_schedule_makes_sense(seed, num_nodes):
    plan = list(schedule(seed, num_nodes, 600, 1.0, 20.0))
    places = set(range(num_places(num_nodes)))
    running, stopped, kills = set(places), set(), []
    for happening in plan:
        at, kind, node = happening
        if kind is Kind.KILL_COORDINATOR:
            kills.append(at)
        elif kind in (Kind.JOIN, Kind.JOIN_TORN, Kind.JOIN_NEW):
            assert node in places - running
            running.add(node)
        elif kind is Kind.WAKE:
            stopped.remove(node)
        else:
            assert node in running
            assert kind is Kind.KILL or node not in stopped
            if kind is Kind.STOP:
                stopped.add(node)
            else:
                running.remove(node)
                stopped.discard(node)
        assert len(running) >= num_nodes
    assert [happening.at_s for happening in plan] == sorted(happening.at_s for happening in plan)
    assert plan[-1].at_s < 600
    gaps = [after - before for before, after in zip([0, *kills], kills, strict=False)]
    assert all(15 <= gap <= 25 for gap in gaps)
    assert len(kills) >= 24
    to_nodes = [h for h in plan if h.kind not in (Kind.KILL_COORDINATOR, Kind.WAKE)]
    assert 500 < len(to_nodes) < 700


def test_the_watch_measures_stalls_and_recoveries():
    watch = Watch(10, 0.0)
    watch.look(11, 1.0)
    watch.killed(2.0)
    watch.look(11, 4.5)
    watch.look(12, 5.0)
    watch.look(13, 5.5)
    assert (watch.longest_s, watch.recoveries_s) == (4.0, [3.0])


class FakeLedger:
    def __init__(self, *entries):
        self.entries = entries

    def frames(self):
        return [entry.encode() for entry in self.entries]


def commit(round, participants, late=()):
    return Commit(round, (1,), (0,), participants, b"\x01" * len(participants), bytes(16), late)


def test_samples_are_told_from_each_other_also_when_late():
    ledger = FakeLedger(commit(0, (0, 1)), commit(1, (0, 2), late=(2,)), commit(2, (0, 1, 2)))
    assert sorted(distinct_samples(ledger)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]


def test_a_sample_that_was_applied_twice_is_found():
    with pytest.raises(SoakError, match="node 1 measured in round 0 were applied twice"):
        list(distinct_samples(FakeLedger(commit(0, (0, 1)), commit(1, (0, 1), late=(1,)))))


def ended(tmp_path, script, **fields):
    out, err = tmp_path / "out", tmp_path / "err"
    with err.open("wb") as file:
        popen = subprocess.Popen([sys.executable, "-c", script], stderr=file)
    popen.wait(60)
    return Process("node-00", popen, out, err, **fields)


def test_who_ends_as_it_may_is_no_failure(tmp_path):
    assert ended(tmp_path, "raise SystemExit(0)", may_end_with=frozenset({0})).check()


def test_an_unexpected_end_fails_the_soak(tmp_path):
    with pytest.raises(SoakError, match="node-00 ended with exit code 9: nobody answers"):
        ended(tmp_path, "import sys; sys.stderr.write('nobody answers'); raise SystemExit(9)").check()


def test_a_trace_fails_the_soak_whatever_the_code(tmp_path):
    script = "import sys, traceback\ntry: 1 / 0\nexcept ArithmeticError: traceback.print_exc()"
    with pytest.raises(SoakError, match="ZeroDivisionError"):
        ended(tmp_path, script, may_end_with=frozenset({0})).check()
