"""The report of the bandwidth suite: what it shows of which rows, and that the documents' table is true."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.bandwidth import cli, plots, report
from benchmarks.bandwidth.results import DIRECTORY, Results

ROOT = Path(__file__).parent.parent.parent
LAYERS = ("payload", "zmtp", "wire")


def wire_row(
    nodes=4, directions=8, codes="int8", curve=True, policy="private", on="network namespaces", think_ms=60
):
    settings = {"nodes": nodes, "directions": directions, "codes": codes, "curve": curve, "policy": policy}
    counts = {
        f"{layer}_{way}": 10.0 * (index + 1) + directions
        for way in ("up", "down")
        for index, layer in enumerate(LAYERS)
    }
    return {**settings, "on": on, "think_ms": think_ms}, counts


def target_row(system, losses, wire_up, forwards, **more):
    points = [
        {
            "exchange": i,
            "seconds": 1.0 * i,
            "payload_up": 10.0 * i,
            "wire_up": wire_up * i,
            "wire_down": wire_up * i,
            "forwards": forwards * i,
            "backwards": 0,
            "loss": loss,
        }
        for i, loss in enumerate(losses)
    ]
    hit = next((point for point in points if point["loss"] <= 3.75), None)
    settings = {"recipe": 1, "quick": False, "rank": 4, "system": system, **more}
    found = {
        "nodes": 8,
        "parameters": 23120,
        "target": 3.75,
        "metric": "loss",
        "points": points,
        "reached": hit,
        "end": losses[-1],
    }
    return settings, {**found, "good_at": "a thing"}


def link_row(bits_per_s, loss=0.0, rounds_per_hour=900.0):
    system = {"system": "ours, 16 local steps", "on": "TAP, user space"}
    settings = {**system, "bits_per_s": bits_per_s, "round_trip_s": 0.6, "loss": loss}
    found = {
        "rounds_per_hour": rounds_per_hour,
        "exchange_s": 3600 / rounds_per_hour,
        "disconnects": 0,
        "joined_s": 20.0,
        "wire_up": 190.0,
        "wire_down": 300.0,
    }
    return settings, found


@pytest.fixture
def results(tmp_path):
    for part, rows in {
        "wire": [
            wire_row(),
            wire_row(nodes=16, directions=64),
            wire_row(curve=False),
            wire_row(codes="1 bit"),
        ],
        "target": [
            target_row("ours, 16 local steps", [4.8, 4.2, 3.7], 200.0, 256),
            target_row("ours, 16 local steps", [4.8, 4.7, 4.6], 200.0, 256, candidate=2),
            target_row("FedAvg, Flower", [4.8, 3.3, 3.1], 100_000.0, 80),
        ],
        "link": [link_row(1_200), link_row(1_000_000, rounds_per_hour=6000.0), link_row(1_200, loss=0.1)],
    }.items():
        kept = Results(part, tmp_path)
        for settings, found in rows:
            kept.add(settings, found)
    return tmp_path


def test_both_pages_have_every_part_and_say_what_is_missing(results):
    outcome = CliRunner().invoke(cli.app, ["report", "--results", str(results)])
    assert outcome.exit_code == 0, outcome.output
    text, page = (results / "report.md").read_text("utf-8"), (results / "report.html").read_text("utf-8")
    for each in (text, page):
        assert (
            "sends 400 B from a node, 250 times fewer bytes up than FedAvg with Flower, 100.0 kB, and" in each
        )
        assert "takes 6.4 times as many forward passes" in each
        assert "What this says" in each
        assert "Not measured yet" in each
        assert "Machine:" in each
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"""(src|href)=["']?(https?:|/)""", page)
    assert "1.2 kbit/s" in text


def test_the_time_over_a_link_is_measured_for_ours_and_computed_for_others(results):
    rows, _ = report.load(results)
    ours, flower = rows["target"][0], rows["target"][2]
    assert report._course_times(ours, rows["link"]) == [(1_200, 28.0), (1_000_000, 21.2)]
    (thin, _) = report._course_times(flower, rows["link"])
    assert thin == (1_200, pytest.approx(8 * 200_000 / 1200 + 0.6))
    over_links = [{**each, "system": flower["system"]} for each in rows["link"]]
    assert report._course_times(flower, over_links)[0] == (1_200, 24.0)
    computed = [{**each, "on": "computed from its bytes"} for each in over_links]
    assert report._course_times(flower, computed)[0] == thin
    _, (first, *_) = report._times([flower], over_links)
    assert first == ["FedAvg, Flower", "24 s ✓", *first[2:]]
    larger = {**flower, "parameters": 982_600}
    assert thin == report._course_times(larger, over_links)[0], (
        "exchanges over links are those of the small adapter"
    )
    assert [report.duration(each) for each in (90, 600, 10_000, 10**6)] == [
        "90 s",
        "10 min",
        "3 h",
        "12 days",
    ]


def test_fedavg_in_floats_is_what_counts_and_int8_is_beside_it():
    rows = [
        {**settings, **found}
        for settings, found in (
            target_row("ours, 64 local steps", [4.8, 3.7], 1000.0, 800),
            target_row("FedAvg int8, Flower", [4.8, 3.3], 25_000.0, 80),
            target_row("FedAvg, Flower", [4.8, 3.3], 100_000.0, 80),
        )
    ]
    assert (
        "sends 1.0 kB from a node, 100 times fewer bytes up than FedAvg with Flower, 100.0 kB "
        "(25 times fewer than FedAvg int8, 25.0 kB), and takes 10 times as many" in report.verdict(rows)
    )


def test_where_first_order_wins_the_report_says_so():
    rows = [
        {**settings, **found}
        for settings, found in (
            target_row("ours, 16 local steps", [4.8, 4.2, 3.7], 200_000.0, 256),
            target_row("FedAvg, Flower", [4.8, 3.3], 100_000.0, 80),
        )
    ]
    assert (
        "400.0 kB from a node, 4.0 times more bytes up than FedAvg with Flower, 100.0 kB"
        in report.verdict(rows)
    )
    assert report.verdict(rows[:1]) == ""


def test_the_summary_has_only_what_was_measured():
    nothing = {part: [] for part in report.PARTS}
    assert report.summary(nothing) == []
    rows = [
        {**settings, **found}
        for settings, found in (wire_row(nodes=16, directions=1), wire_row(nodes=16, directions=64))
    ]
    scale = {
        "nodes": 16,
        "rounds_per_s": 1.0,
        "cpu_share": 0.01,
        "memory_bytes": 2e8,
        "keeps_up": True,
        "why": "",
    }
    full = {**scale, "nodes": 4000, "rounds_per_s": 0.5, "keeps_up": False, "why": "the cores are full"}
    idle = {"what": "idle for 80 s", "seconds": 80.0, "wire_up": 174, "wire_down": 172}
    short = {**idle, "what": "idle for 20 s", "seconds": 20.0}
    said = report.summary({**nothing, "wire": rows, "scale": [scale, full], "session": [idle, short]})
    assert said == [
        "A round of 16 nodes with one direction each costs a node 31 B up and 31 B down, everything counted; "
        "64 in one report cost 1.47 B each.",
        "A node that only waits costs 4.3 B/s, both ways.",
        "One coordinator keeps up with 16 nodes that report once a second; it has 1% of a core to do and 200 MB.",
        "With 4,000 nodes there were 0.50 rounds a second: the cores are full.",
    ]


def test_axes_are_labelled_in_the_largest_unit_that_a_value_fills():
    assert [plots.quantity(each, plots._TIMES) for each in (1, 90, 7200, 864_000)] == [
        "1 s",
        "1.5 min",
        "2 h",
        "10 d",
    ]
    assert [plots.quantity(each, plots._BITS) for each in (1_200, 1e6)] == ["1.2 kbit/s", "1 Mbit/s"]
    assert plots.quantity(0.5, plots._PASSES) == "0.5"


def test_the_documents_table_leaves_out_loopback_and_nodes_that_do_not_compute():
    rows = [
        {**settings, **found}
        for settings, found in (
            wire_row(nodes=1),
            wire_row(nodes=4),
            wire_row(nodes=16, on="LOOPBACK, counted by TCP_INFO"),
            wire_row(nodes=16, think_ms=0),
            wire_row(nodes=16, curve=False),
        )
    ]
    assert len(report.wire_table(rows)) == 3
    assert report.wire_table(rows)[2] == "| 1 | 8 | 18 | 28 | 38 | 4.75 | 18 | 28 | 38 |"


def test_what_is_made_stands_between_its_marks():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    made = report.inserted(text, ["new"])
    assert made == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.inserted(made, ["new"]) == made
    with pytest.raises(ValueError, match="lacks the marks"):
        report.inserted("nothing", ["new"])


def test_a_damaged_file_is_named_and_the_page_goes_without(results):
    (results / "session.json").write_text('{"rows": [{}]}')
    outcome = CliRunner().invoke(cli.app, ["report", "--results", str(results)])
    assert outcome.exit_code == 0, outcome.stderr
    assert "session.json holds no results" in outcome.stderr
    text = (results / "report.md").read_text("utf-8")
    assert "Not measured yet: `zo-bench session --out DIR`" in text
    assert "1.2 kbit/s" in text


def test_a_report_of_nothing_is_refused(tmp_path):
    outcome = CliRunner().invoke(cli.app, ["report", "--results", str(tmp_path)])
    assert outcome.exit_code == 3
    assert "holds no results" in outcome.stderr


def test_the_readmes_table_is_that_of_the_committed_results():
    text = (ROOT / "README.md").read_text("utf-8")
    rows = report.load(ROOT / DIRECTORY)[0]["wire"]
    assert len(report.wire_table(rows)) == 2 + 8
    assert report.inserted(text, report.wire_table(rows)) == text
