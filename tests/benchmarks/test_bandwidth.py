"""The bandwidth suite: counts of bytes, what is measured again, and that nothing is left behind."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from benchmarks import machine
from benchmarks.bandwidth import cli, network, runs, theory, wire
from benchmarks.bandwidth.clients import differences
from benchmarks.bandwidth.results import Results, ResultsError, bare, key_of
from transport.brevity import brief
from transport.messages import Report, encode
from zo.commit import Commit

needs_namespaces = pytest.mark.skipif(bool(network.unavailable()), reason=network.unavailable())


@pytest.mark.parametrize("round", [0, 127, 128, 255])
@pytest.mark.parametrize("directions", [1, 3, 8, 16, 250, 256])
def test_the_theory_counts_what_the_codec_makes_of_a_report(round, directions):
    assert theory.report_bytes(directions, 8) == len(encode(Report(round, bytes(directions))))


@pytest.mark.parametrize("round", [3, 128, 256, 70_000])
@pytest.mark.parametrize(("nodes", "directions"), [(1, 1), (3, 1), (15, 8), (16, 1), (64, 256), (300, 256)])
def test_the_theory_counts_what_the_codec_makes_of_a_commit(round, nodes, directions):
    before = Commit(round, (2**20,), (-4,), tuple(range(nodes)), bytes(nodes * directions), bytes(16))
    short = brief(before, msgspec.structs.replace(before, round=round + 1, previous=before.digest()))
    assert short is not None
    assert theory.commit_bytes(nodes, directions, 8, "private") == len(encode(short))


def test_narrow_codes_share_bytes():
    assert [theory.packed_bytes(9, bits) for bits in (8, 4, 1)] == [9, 5, 2]


def test_a_heartbeat_in_one_round_of_many_does_not_count():
    marks = [{"wire_up": count} for count in (0, 400, 800, 1374, 1774)]
    assert differences(marks, nodes=4) == {"wire_up": 100}


def test_quick_has_a_part_of_the_cells_and_each_without_curve_follows_its_twin():
    everything, few = wire.cells(False), wire.cells(True)
    assert set(few) < set(everything)
    assert len(everything) == 2 * 4 * 4 * 3 * 3
    for cells in (everything, few):
        for with_curve, without in zip(cells[::2], cells[1::2], strict=True):
            assert (with_curve.curve, without.curve) == (True, False)
            assert str(without) == f"{with_curve}, no CURVE"


def test_rows_are_kept_and_found_again_and_those_of_another_commit_are_measured_anew(tmp_path, monkeypatch):
    settings = {"nodes": 4, "codes": "int8"}
    row = Results("wire", tmp_path).add(settings, {"wire_up": 174.0})
    again = Results("wire", tmp_path)
    assert again.find(settings) == row
    assert again.find({**settings, "nodes": 5}) is None
    assert again.foreign() == []
    assert bare(row) == {**settings, "wire_up": 174.0}
    assert row["key"] == key_of(settings)
    monkeypatch.setattr(machine, "commit", lambda: "another")
    assert again.find(settings) is None
    assert len(again.foreign()) == 1


def test_a_file_that_holds_no_results_is_refused_by_name(tmp_path):
    (tmp_path / "wire.json").write_text('{"rows": [{}]}')
    with pytest.raises(ResultsError, match=r"wire\.json holds no results"):
        Results("wire", tmp_path)


def test_processes_end_with_the_network_also_when_it_is_interrupted(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), network.network(loopback=True) as net:
        child = net.start("nodes", ["sleep", "1000"], errors=tmp_path / "err")
        os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C
        time.sleep(10)
    assert child.returncode == -signal.SIGKILL


@needs_namespaces
def test_namespaces_are_made_reach_only_each_other_and_go(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), network.network() as net:
        assert net.interface is not None
        assert net.count() == network.Interface(0, 0, 0, 0)
        names = sorted(path.name for path in network._NAMESPACES.glob(f"{network.PREFIX}-{os.getpid()}-*"))
        assert len(names) == 2
        routes = net.start("nodes", ["ip", "route"], errors=tmp_path / "err")
        assert [line.split()[0] for line in routes.stdout.read().splitlines()] == ["10.231.77.0/30"]
        raise KeyboardInterrupt
    assert not any((network._NAMESPACES / name).exists() for name in names)


@needs_namespaces
def test_what_a_killed_suite_left_is_swept_away():
    gone = subprocess.Popen(["true"])
    gone.wait()
    name = f"{network.PREFIX}-{gone.pid}-c"
    subprocess.run(["ip", "netns", "add", name], check=True)
    assert name in network.sweep()
    assert not (network._NAMESPACES / name).exists()


def test_without_root_or_ip_it_says_so_and_goes_on_over_loopback(monkeypatch):
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    with network.network() as net:
        assert net.interface is None
        assert net.label == "LOOPBACK, counted by TCP_INFO: network namespaces need root; run it with sudo"
    monkeypatch.setattr(network.os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda _: None)
    assert network.unavailable() == "there is no `ip` command; install iproute2"


@pytest.mark.e2e
def test_a_round_over_loopback_costs_what_the_theory_says(tmp_path, monkeypatch):
    cells = [wire.Cell(nodes=2, directions=8, codes="int8", policy="private", curve=True)]
    monkeypatch.setattr(wire, "cells", lambda quick: cells)
    arguments = ["wire", "--json", "--loopback", "--rounds", "2", "--think-ms", "0", "--out", str(tmp_path)]
    outcome = CliRunner().invoke(cli.app, arguments)
    (row,) = json.loads(outcome.stdout)
    assert row["payload_up"] == row["theory_up"] == 10
    assert row["payload_up"] < row["zmtp_up"] < row["wire_up"]
    assert row["on"].startswith("LOOPBACK")
    assert {"nodes", "directions", "codes", "curve", "policy", "zmtp_down", "wire_down"} < set(row)
    assert len(Results("wire", tmp_path).rows) == 1


def test_a_setting_that_the_product_lacks_is_known_to_be_lacking(tmp_path):
    manifest = runs.template(tmp_path / "run").manifest()
    assert runs.knows(manifest, {"probe": {"directions": 64}})
    assert not runs.knows(manifest, {"codes": {"bits": 3}})
    assert not runs.knows(manifest, {"probe": {"directions": 0}})
    assert runs.varied(manifest, {}).run_id != manifest.run_id


def test_the_suite_is_a_part_of_the_installed_program():
    text = (Path(machine.ROOT) / "pyproject.toml").read_text("utf-8")
    assert 'zo-bench = "benchmarks.bandwidth.cli:main"' in text
    assert '"benchmarks.bandwidth"' in text
