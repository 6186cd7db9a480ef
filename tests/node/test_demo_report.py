"""The end of the demo: what counts as passed, and how the outcome is shown and drawn."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from node.demo_report import NodeBytes, Outcome, plot, show

COUNTS = {"payload_up": 900, "payload_down": 3000, "zmtp_up": 4000, "zmtp_down": 6000}
NODES = (
    NodeBytes(name="ada", **COUNTS, wire_up=9000, wire_down=12000),
    NodeBytes(name="ben", **COUNTS, wire_up=None, wire_down=None),
)
OUTCOME = Outcome(
    rounds=240,
    training_s=40.0,
    loss_before=3.0,
    loss_after=2.5,
    digest="ab" * 16,
    num_equal=4,
    num_alive=4,
    nodes=NODES,
    adapter_bytes=160_000,
    curve=((0, 100, 3.0), (120, 5000, 2.7), (240, 10000, 2.5)),
    changes=(("ben", "killed", 80), ("eve", "joined", 120)),
)


def shown(outcome, path):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show(outcome, ["round 80: killed ben (SIGKILL)"], path, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"loss_after": 3.0}, False),
        ({"loss_after": float("nan")}, False),
        ({"num_equal": 3}, False),
        ({"num_equal": 3, "num_alive": 3}, False),
    ],
)
def test_what_counts_as_passed(changes, passed):
    assert replace(OUTCOME, **changes).passed is passed


def test_the_outcome_says_all_that_the_demo_promises(tmp_path):
    text = shown(OUTCOME, tmp_path)
    assert "held-out loss fell: 3.0000 before, 2.5000 after 240 rounds in 40 s" in text
    assert f"parity: 4/4 equal, digest {OUTCOME.digest}" in text
    assert "160,000" in text, "what one exchange of the adapter would cost"
    assert "round 80: killed ben (SIGKILL)" in text
    ada, ben = (next(line for line in text.splitlines() if line.startswith(name)) for name in ("ada", "ben"))
    assert ada.split() == ["ada", "900", "3,000", "4,000", "6,000", "9,000", "12,000"]
    assert ben.split()[-2:] == ["killed", "killed"]


def test_a_loss_that_did_not_fall_is_said(tmp_path):
    assert "held-out loss DID NOT FALL" in shown(replace(OUTCOME, loss_after=3.1), tmp_path)


def test_the_picture(tmp_path):
    plot(OUTCOME, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
