"""The bandwidth suite: counts of bytes, what is measured again, and that nothing is left behind."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from benchmarks import machine
from benchmarks.bandwidth import cli, link, network, runs, scale, target, theory, wire
from benchmarks.bandwidth.chain import Chain
from benchmarks.bandwidth.counters import differences
from benchmarks.bandwidth.emulator import QUEUE_BYTES, Link, port_of
from benchmarks.bandwidth.results import Results, ResultsError, bare, key_of
from benchmarks.light_node import Onlooker
from node import embedded
from transport.brevity import brief
from transport.messages import Report, encode
from zo.commit import Commit, decode_entry, genesis
from zo.replica import ChainError, Replica

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
    everything, usual, few = wire.cells(False, every=True), wire.cells(False), wire.cells(True)
    assert set(few) < set(usual) < set(everything)
    assert [len(each) for each in (everything, usual, few)] == [
        2 * 4 * 4 * 3 * 3,
        2 * (16 + 8 * 6),
        2 * (4 + 4),
    ]
    for cells in (everything, usual, few):
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
    monkeypatch.setattr(wire, "cells", lambda quick, every: cells)
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


def test_a_frame_leaves_a_link_when_those_before_it_have():
    thin = Link(bits_per_s=8000, delay_s=0.3, loss=0.0)
    assert [thin.passes(100, now) for now in (0.0, 0.0, 5.0)] == pytest.approx([0.4, 0.5, 5.4])


def test_a_link_drops_what_its_queue_does_not_hold_and_takes_one_frame_of_any_size():
    thin = Link(bits_per_s=8, delay_s=0.0, loss=0.0)
    assert thin.passes(QUEUE_BYTES + 1, 0.0) is not None
    assert thin.passes(1, 0.0) is None
    assert thin.passes(1, QUEUE_BYTES + 1.0) is not None


def test_a_lossy_link_loses_its_share():
    lossy = Link(bits_per_s=1e9, delay_s=0.0, loss=0.1, rng=random.Random(1))
    lost = sum(lossy.passes(100, float(second)) is None for second in range(10_000))
    assert 900 < lost < 1100


def test_a_connection_is_known_by_the_port_at_the_nodes_end():
    ip = bytes([0x46]) + bytes(8) + bytes([6]) + bytes(14)  # a header of 24 bytes
    frame = bytes(12) + b"\x08\x00" + ip + (40_000).to_bytes(2, "big") + (7411).to_bytes(2, "big") + bytes(16)
    assert port_of(frame, of_source=True) == 40_000
    assert port_of(frame, of_source=False) == 7411
    assert port_of(bytes(12) + b"\x08\x06" + bytes(40), of_source=True) == 0
    assert port_of(b"short", of_source=True) == 0


def test_time_over_a_link_is_joining_and_rounds_or_bytes_and_round_trips():
    assert link.seconds_to(20, {"joined_s": 30.0, "rounds_per_hour": 900.0}) == 110
    way = link.Way(bits_per_s=8000, round_trip_s=0.5, loss=0.0)
    assert link.seconds_computed(1000, 3000, 2, way) == 5
    assert str(way) == "8 kbit/s, 500 ms, 0% loss"


def samples(*rounds, cpu_s=0.1):
    return [
        scale.Sample(float(i), r, i * cpu_s, 2 * i * cpu_s, 4 * i * cpu_s, 10**6, 100 * r, 200 * r)
        for i, r in enumerate(rounds)
    ]


def test_the_coordinator_is_judged_from_the_warm_up_to_its_last_round():
    row = scale.summary(samples(0, 3, 4, 5, 6, 6, 6), nodes=10)
    assert (row["rounds"], row["rounds_per_s"], row["keeps_up"]) == (3, 1.0, True)
    assert row["cpu_ms_per_round"] == pytest.approx(100)
    assert (row["wire_up"], row["wire_down"]) == (10, 20)
    assert [row[f"{whose}cpu_share"] for whose in ("", "nodes_", "machine_")] == pytest.approx(
        [0.1, 0.2, 0.4]
    )
    with pytest.raises(wire.Unmeasured, match="no rounds were committed with 10 nodes"):
        scale.summary(samples(0, 3, 3), nodes=10)


def test_why_a_coordinator_does_not_keep_up_is_said():
    row = {"nodes": 100, "still_up": 100, "keeps_up": True, "cpu_share": 0.1, "nodes_cpu_share": 0.5}
    row["machine_cpu_share"] = 1.0
    assert scale.reason(row, 2) == ""
    assert scale.reason({**row, "still_up": 90}, 2) == "10 nodes lost their connection"
    slow = {**row, "keeps_up": False}
    assert scale.reason({**slow, "cpu_share": 0.99}, 2).endswith("its core is full")
    shares = "the coordinator takes 10% of a core, the nodes 50%, and what else runs here"
    assert scale.reason(slow, 2) == f"{shares} 40%: a round, from report to commit, takes longer than 1 s"
    assert (
        scale.reason({**slow, "machine_cpu_share": 1.9}, 2)
        == f"{shares} 130%: the machine's 2 cores are full"
    )


def test_the_processor_time_of_a_process_and_of_the_machine_is_read():
    before = scale.cpu_seconds(os.getpid()), scale.machine_cpu_seconds()
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert scale.cpu_seconds(os.getpid()) > before[0]
    assert scale.machine_cpu_seconds() > before[1]


@pytest.fixture(scope="module")
def light_manifest(tmp_path_factory):
    manifest = runs.template(tmp_path_factory.mktemp("light") / "run").manifest()
    return runs.varied(manifest, {"probe": {"directions": 4}})


def commits(manifest, num):
    previous, found = genesis(manifest.run_id, 0), []
    for round in range(num):
        codes = bytes([round + 1, 2, 3, 4, 250, 6, 7, 8])
        found.append(Commit(round, (2**16,), (-4,), (0, 1), codes, previous))
        previous = found[-1].digest()
    return found


def test_nodes_that_share_their_weights_have_what_each_would_have_alone(light_manifest):
    chain = Chain(embedded.path())
    alone = Replica(light_manifest, Onlooker(light_manifest, embedded.path()).initial_weights())
    first, second = chain.replica(light_manifest), chain.replica(light_manifest)
    entries = commits(light_manifest, 3)
    for entry in entries:
        first.apply(entry)
    for entry in entries:  # as of an own frame: equal, and another object
        second.apply(decode_entry(entry.encode()))
        alone.apply(entry)
        assert (second.round, second.head) == (alone.round, alone.head)
        assert second.digest() == alone.digest()
    assert first.digest() == alone.digest()
    with pytest.raises(ChainError, match="where round 3 is due"):
        first.apply(entries[0])
    other = msgspec.structs.replace(entries[0], codes=bytes(8))
    with pytest.raises(ChainError, match="two commits of round 0"):
        chain.replica(light_manifest).apply(other)


def test_a_commit_is_expanded_once_for_all_who_had_the_same_one_before(light_manifest):
    chain, (before, after) = Chain(embedded.path()), commits(light_manifest, 2)
    frame = encode(brief(before, after))
    message = chain.decoded(frame)
    assert chain.decoded(bytes(bytearray(frame))) is message
    assert chain.expanded(message, before) == after
    assert chain.expanded(message, before) is chain.expanded(message, before)
    assert chain.expanded(message, after) is message  # it does not follow: the session says where it is


def points(*losses):
    return [{"exchange": 10 * i, "wire_up": 1000.0 * i, "loss": loss} for i, loss in enumerate(losses)]


def test_the_target_is_reached_at_the_end_of_the_exchange_that_passes_it():
    found = target.reached(points(5.0, 4.0, 3.0), 3.75)
    assert found == {"exchange": 13, "wire_up": 1300, "loss": pytest.approx(3.7)}
    assert target.reached(points(5.0, 4.0), 3.75) is None


def test_of_a_systems_candidates_the_one_with_the_fewest_bytes_to_the_target_counts():
    def row(system, wire_up, end):
        hit = None if wire_up is None else {"wire_up": wire_up}
        return {"system": system, "reached": hit, "end": end}

    rows = [
        row("a", None, 3.0),
        row("a", 500.0, 3.5),
        row("a", 400.0, 3.6),
        row("b", None, 4.2),
        row("b", None, 4.1),
    ]
    assert target.best(rows) == [rows[2], rows[4]]


def test_every_system_has_as_many_candidates_and_quick_has_one():
    ours = [
        each.name for each in target.systems(False) if each.kind != "ours" or each.name.startswith("ours")
    ]
    assert {ours.count(name) for name in ours} == {3}
    few = [each.name for each in target.systems(True)]
    assert len(few) == len(set(few)) == 4


def test_another_recipe_than_the_first_is_refused():
    outcome = CliRunner().invoke(cli.app, ["target", "--recipe", "9", "--loopback"])
    assert outcome.exit_code == 3
    assert "recipe must be 1" in outcome.stderr


def test_the_suite_is_a_part_of_the_installed_program():
    text = (Path(machine.ROOT) / "pyproject.toml").read_text("utf-8")
    assert 'zo-bench = "benchmarks.bandwidth.cli:main"' in text
    assert '"benchmarks.bandwidth"' in text
