"""What a person sees of a node, in a wide and in a narrow terminal."""

import io

import pytest
from rich.console import Console, Group

from node.display import summary, view_line
from node.service import View
from transport.meter import SocketCount, si_bytes
from transport.session import Stage


@pytest.fixture
def view():
    view = View(stage=Stage.FOLLOWING, node=3, round=8, rounds=30, members=4, loss=3.25)
    view.meter.count_up("Report", 2000)
    view.meter.count_down("Commit", 4000)
    view.num_directions = 1000
    return view


def seen(renderable, width):
    """What stands in a terminal of this width, line by line, rendered as Live does."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(Group(renderable))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (5e12, "5000.0 GB")]
)
def test_bytes(count, text):
    assert si_bytes(count) == text


def test_the_live_line(view):
    view.lag_s = 0.0421
    assert view_line(view).plain == (
        "node 3 · round 8/30 · loss 3.250 · 4 members · up 2.0 kB down 4.0 kB · 2.0 B/direction · lag 42 ms"
    )


def test_before_anything_is_known():
    assert view_line(View()).plain == "connecting …"
    assert view_line(View(notice="loading the base")).plain == "loading the base"


def test_what_goes_wrong_is_shown_in_a_narrow_terminal_too(view):
    view.num_no_votes, view.loss = 12, None
    assert "12 without a finite loss" in seen(view_line(view), 60)[0]
    view.notice = "connection lost, reconnecting"
    assert seen(view_line(view), 60) == ["round 8/30 · connection lost, reconnecting"]


@pytest.mark.parametrize(
    "notice", ["", "starting over: the weights of round 8 differ from the ledger's " + "a" * 32]
)
@pytest.mark.parametrize("width", [20, 60, 80])
def test_the_live_line_is_one_line(view, notice, width):
    view.notice = notice
    lines = seen(view_line(view), width)
    assert len(lines) == 1
    assert len(lines[0]) <= width


def test_catching_up_is_shown(view):
    view.behind = 1200
    assert "catching up, 1,200 behind" in view_line(view).plain


def test_the_summary_fits_a_narrow_terminal(view):
    view.socket = SocketCount(3000, 5000, 10, 10)
    lines = summary(view).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["payload", "ZMTP", "socket", "wire"]
    assert max(map(len, lines)) <= 60
    assert "2.0 kB" in lines[1]
    assert "3.7 kB" in lines[4], "3,000 bytes and 10 segments of 66 bytes of headers"
