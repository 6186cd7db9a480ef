"""The benchmark of probing: every way measures the same losses, and the page says what was measured."""

from argparse import Namespace
from dataclasses import asdict

import pytest

from benchmarks import probing
from node import embedded

OPTIONS = Namespace(model=["/somewhere/private/base"], quick=False, random=True, quantize="nf4", threads=1)


@pytest.mark.parametrize(("upper", "sides", "ways"), [(False, 2, "124"), (True, 1, "24")])
def test_a_row_compares_ways_to_the_same_losses(upper, sides, ways):
    row = probing.measure(str(embedded.path()), "none", upper, (1, 8), sides, turns=2, threads=1)
    assert "".join(row.ratios) == ways
    assert all(ratio > 0 for ratio in row.ratios.values())
    assert row.largest_difference < 1e-5
    figures = {
        "rows": [asdict(row)],
        "command": probing._command(OPTIONS),
        "cpu": "a CPU",
        "commit": "abc",
        "threads": 1,
        "turns": 2,
        "versions": {"torch": "2"},
    }
    lines = probing.markdown(figures).splitlines()
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|")
    assert f"| {row.adapted} | 1 × 8 | {sides} |" in lines[4]


def test_the_command_names_no_place():
    command = "python -m benchmarks.probing --model base --random --quantize nf4 --threads 1"
    assert probing._command(OPTIONS) == command
