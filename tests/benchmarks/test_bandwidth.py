"""The bandwidth suite: counts of bytes, what is measured again, and that nothing is left behind."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import machine
from benchmarks.bandwidth import (
    cli,
    contenders,
    contest,
    flower,
    int8,
    link,
    loads,
    network,
    runs,
    scale,
    systems,
    target,
    theory,
    wire,
)
from benchmarks.bandwidth.chain import Chain
from benchmarks.bandwidth.counters import differences
from benchmarks.bandwidth.emulator import QUEUE_BYTES, Link, port_of
from benchmarks.bandwidth.results import Results, bare, key_of
from benchmarks.light_node import Onlooker
from benchmarks.recipes import assets
from benchmarks.rows import ResultsError
from coordinator.rundir import RunDirectory
from node import embedded
from transport.brevity import brief
from transport.messages import Report, encode
from transport.squeezing import squeezed
from zo.codes import encode as encode_codes
from zo.combine import combine
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


@pytest.mark.parametrize("nodes", [1, 16])
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_the_theory_says_which_commits_may_be_squeezed(bits, nodes):
    rng = np.random.default_rng(0)
    codes = encode_codes(rng.normal(0, 32, (nodes, 256)), 0, rng, bits)
    before = Commit(7, (2**20,), (-4,), (0,), bytes(256), bytes(16))
    after = msgspec.structs.replace(before, round=8, codes=combine(codes, "mean").tobytes())
    frame = encode(brief(before, msgspec.structs.replace(after, previous=before.digest())))
    assert len(frame) == theory.commit_bytes(nodes, 256, bits, "shared")
    assert len(squeezed(frame)) == len(frame) or theory.may_be_squeezed(bits, "shared")
    assert len(squeezed(frame)) < len(frame) or bits > 1


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


def test_an_exchange_waits_for_its_bytes_and_round_trips():
    server = loads.server_load(1448, 2 * 1448)
    assert (server.up_bytes, server.down_bytes) == (1514, 3028)
    assert server.seconds(8 * 1514, 0.6) == pytest.approx(3.6)
    ring = loads.ring_load(8 * 1448, 8)
    assert (ring.up_bytes, ring.round_trips) == (14 * 1514, 7)
    assert ring.seconds(8 * 1514, 0.6) == pytest.approx(14 + 4.2)


def test_a_system_is_usable_down_to_the_rate_at_which_it_takes_a_day():
    load = loads.server_load(10**6, 10**6)
    rate = load.slowest(4, 0.6)
    assert rate is not None
    assert 4 * load.seconds(rate, 0.6) == pytest.approx(loads.DAY_S)
    assert load.slowest(10**6, 0.6) is None


def test_time_to_the_target_is_of_as_many_exchanges_as_were_found():
    row = {
        "system": "ours, 16 local steps",
        "round_trip_s": 0.6,
        "joined_s": 30.0,
        "exchange_s": 4.0,
        "wire_up": 186.0,
        "wire_down": 289.0,
    }
    found = link.with_target(row, 20)
    assert (found["target_s"], found["is_usable"]) == (110, True)
    assert found["usable_from"] == pytest.approx(20 * 8 * 475 / (loads.DAY_S - 12))
    assert not link.with_target(row, 30_000)["is_usable"]
    assert link.with_target(row, None)["target_s"] is None


def test_what_would_take_minutes_an_exchange_or_has_no_server_is_computed():
    thin, wide = (link.Way(bits_per_s=rate, round_trip_s=0.6, loss=0.0) for rate in (1_200, 1_000_000))
    assert link.is_measured("ours, 16 local steps", thin)
    assert not link.is_measured("FedAvg, Flower", thin)
    assert link.is_measured("FedAvg, Flower", wide)
    assert not link.is_measured("gradients, gloo", wide)
    for system, way in link.pairs(quick=False):
        assert link.is_measured(system, way) or not way.loss


def test_where_links_cannot_be_emulated_what_can_be_computed_still_is():
    wanted = [
        (name, link.Way(bits_per_s=1_200, round_trip_s=0.6, loss=0.0)) for name in (*link.OURS, *link.FLOWER)
    ]
    nowhere = network.Network(None, "no root")
    found = list(
        link.measure(nowhere, wanted, None, Results("link", None), 1.0, lambda _: None, {"FedAvg, Flower": 1})
    )
    ours = len(link.OURS)
    assert [isinstance(each, str) for each in found] == [True] * ours + [False, False]
    assert "links are emulated between namespaces" in found[0]
    assert found[ours]["on"] == "computed from 96,704 B up, 96,704 B down and 1 round trips"
    assert found[ours]["target_s"] == pytest.approx(8 * 2 * 96_704 / 1_200 + 0.6)


def test_exchanges_to_the_target_are_those_of_the_best_whole_runs_of_the_first_recipe():
    def row(system, exchange, recipe=1, quick=False, search=False):
        hit = None if exchange is None else {"exchange": exchange, "wire_up": float(exchange)}
        return {
            "recipe": recipe,
            "quick": quick,
            "rank": 4,
            "search": search,
            "system": system,
            "reached": hit,
            "end": 3.0,
        }

    rows = [row("a", 20), row("a", 18), row("a", 2, search=True), row("a", 1, quick=True), row("b", None)]
    assert loads.exchanges_to_target(rows) == {"a": 18}


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


@pytest.mark.parametrize("recipe", [1, 2, 3])
def test_every_system_has_three_candidates_and_quick_has_one(recipe):
    everyone = systems.systems(recipe, quick=False)
    assert {len(each.candidates) for each in everyone} == {3}
    assert len({each.name for each in everyone}) == len(everyone)
    few = systems.systems(recipe, quick=True)
    assert [each.name for each in few] == list(systems.QUICK)
    assert {(each.num_runs, each.exchanges) for each in few} == {(1, 2)}


def test_those_that_need_no_gradient_have_as_many_forward_passes_within_a_tenth():
    def passes(each):
        probe = each.candidates[0]["probe"]
        return (1 if each.alone else 8) * each.exchanges * probe["directions"] * probe["sides"]

    without = [each for each in systems.systems(1, quick=False) if "probe" in each.candidates[0]]
    counts = {each.name: passes(each) for each in without if each.name != "ours, 4 directions a round"}
    longest = counts.pop(
        "ours, 64 local steps"
    )  # few rounds: it stops at whole ones, as docs/bandwidth.md says
    assert max(counts.values()) < 1.1 * min(counts.values())
    assert longest <= 1.4 * counts["ours, 16 local steps"]


def test_an_adapter_of_a_larger_rank_gets_smaller_steps():
    assert systems.systems(1, quick=False, rank=4) == systems.systems(1, quick=False)
    assert systems.systems(3, quick=False, rank=16) == systems.systems(3, quick=False)
    wide = {each.name: each for each in systems.systems(1, quick=False, rank=64)}
    for small in systems.systems(1, quick=False):
        for one, other in zip(small.candidates, wide[small.name].candidates, strict=True):
            (name, step), (_, smaller) = (deciding(settings) for settings in (one, other))
            assert step / smaller == pytest.approx(16 if name == "raw" else 4, rel=1e-2), small.name


def deciding(settings):
    """The figure of a candidate that a search is about, and what it is."""
    if "rate" in settings or "moves" in settings:
        return "rate", (settings | settings.get("moves", {}))["rate"]
    schedule = settings["schedule"]
    return "step" if schedule.get("normalised", True) else "raw", schedule["step"]


@pytest.mark.parametrize("system", systems.systems(1, quick=False), ids=lambda each: each.name)
def test_the_manifest_takes_every_candidate(system, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "candidates"
    manifest = (RunDirectory(path) if path.exists() else runs.template(path)).manifest()
    if system.kind == "ours":
        assert all(runs.knows(manifest, candidate) for candidate in system.candidates)


def test_systems_are_chosen_by_a_part_of_their_name():
    everyone = systems.systems(1, quick=False)
    assert [each.name for each in systems.chosen(everyone, ["fedavg", "16 LOCAL"])] == [
        "ours, 16 local steps",
        "FedAvg, Flower",
        "FedAvg int8, Flower",
    ]
    with pytest.raises(ValueError, match="no system is called 'fedprox'; there are: ours, 16 local steps;"):
        systems.chosen(everyone, ["fedprox"])


def test_a_move_in_int8_is_right_in_the_mean_and_never_off_by_more_than_a_unit():
    sizes = np.array([3, 4, 2])
    move = np.array([0.1, -0.2, 0.05, 1e-3, 2e-3, -4e-3, 0.0, 0.0, 0.0], np.float32)
    rng = np.random.default_rng(1)
    many = [int8.restored(*int8.quantised(move, sizes, rng), sizes) for _ in range(2000)]
    unit = np.repeat([0.2, 4e-3, 0.0], sizes) / int8.LIMIT
    assert (np.abs(np.array(many) - move) <= unit * 1.001).all()
    assert (np.abs(np.mean(many, axis=0) - move) <= unit / 20).all()
    codes, scales = int8.quantised(move, sizes, rng)
    assert (codes.dtype, scales.dtype, scales.size) == (np.int8, np.float32, 3)
    assert codes[1] == -int8.LIMIT


def test_short_runs_choose_a_step_and_are_in_no_table():
    rows = [
        {"system": "a", "reached": None, "end": end, "search": search}
        for end, search in ((3.0, True), (3.5, False))
    ]
    assert target.best(rows) == [rows[1]]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["target", "--recipe", "9"], "recipe must be 1, 2 or 3, those that systems are compared on; got 9"),
        (
            ["target", "--system", "fedprox"],
            "no system is called 'fedprox'; there are: ours, 16 local steps;",
        ),
        (["link", "--system", "fedprox"], "no system is called 'fedprox'; there are: ours"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_set_up(monkeypatch, command, says):
    monkeypatch.setattr(cli, "network", lambda **_: pytest.fail("namespaces were made"))
    outcome = CliRunner().invoke(cli.app, command)
    assert outcome.exit_code == 3, outcome.output
    assert says in outcome.stderr


@pytest.mark.e2e
@pytest.mark.skipif(assets.VARIABLE not in os.environ, reason=f"{assets.VARIABLE} names no directory")
def test_a_run_whose_weights_overflow_is_given_up_at_once_and_says_so(tmp_path):
    made = contest.prepare(1, tmp_path, quick=True, rank=1)
    (own,) = systems.chosen(systems.systems(1, quick=False), ["just one byte"])
    settings = {
        "probe": {"directions": 1, "sides": 2, "epsilon": 0.01, "batch_size": 1, "sequence_length": 8},
        "schedule": {"decay": "constant", "normalised": False, "step": 4.0, "full_votes": 1},
    }
    with (
        network.network(loopback=True) as net,
        pytest.raises(
            wire.Unmeasured, match=r"(?s)it ended after \d+ of 500 exchanges: .*a weight of magnitude"
        ),
    ):
        contenders.run(net, made, own, settings, 500, lambda exchange: None)


def test_processes_are_forked_with_arguments_of_their_own_and_a_failure_is_told(tmp_path):
    (tmp_path / "forked_by_a_test.py").write_text(
        "import pathlib, sys\n\n\ndef main():\n"
        "    pathlib.Path(sys.argv[1]).write_text(sys.argv[2])\n"
        "    return int(sys.argv[3])\n"
    )
    with network.network(loopback=True) as net:
        for status in (0, 3):
            arguments = [[str(tmp_path / name), name, str(status)] for name in ("a", "b")]
            module = [sys.executable, "-m", "benchmarks.bandwidth.forks", "forked_by_a_test"]
            child = net.start(
                None,
                module,
                errors=tmp_path / "err",
                environment={"PYTHONPATH": f"{machine.ROOT}:{tmp_path}"},
            )
            child.stdin.write(json.dumps(arguments) + "\n")
            child.stdin.flush()
            assert child.wait() == (1 if status else 0)
    assert (tmp_path / "a").read_text() == "a"


def test_a_flower_that_will_not_install_is_one_line_and_no_more(tmp_path, monkeypatch):
    def failing(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: No matching distribution found")

    monkeypatch.setattr(flower.subprocess, "run", failing)
    with pytest.raises(
        wire.Unmeasured, match=f"flwr {flower.VERSION} cannot be installed: ERROR: No matching"
    ):
        flower.environment(tmp_path)


def test_the_suite_is_a_part_of_the_installed_program():
    text = (Path(machine.ROOT) / "pyproject.toml").read_text("utf-8")
    assert 'zo-bench = "benchmarks.bandwidth.cli:main"' in text
    assert '"benchmarks.bandwidth"' in text
