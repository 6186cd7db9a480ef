"""What a person sees of a run, in a wide and in a narrow terminal."""

import io
import time

import msgspec
import pytest
from rich.console import Console, Group

from coordinator.display import duration, pace, status_line, status_view
from coordinator.service import SPEED_MEMORY_ROUNDS, SPEED_MEMORY_S, Speed
from coordinator.status import MemberStatus, Status
from transport.meter import si_bytes

MEMBER = msgspec.convert(
    {
        **dict.fromkeys(MemberStatus.__struct_fields__, 0),
        "name": "ada",
        "key": "ab" * 32,
        "estimator": "backward",
        "presence": "live",
        "round": 8,
        "digest_round": 8,
        "digest": "cd" * 16,
        "loss": 3.25,
        "latency_s": 0.1,
    },
    MemberStatus,
    strict=False,
)
STATUS = msgspec.convert(
    {
        **dict.fromkeys(Status.__struct_fields__, 0),
        "run": "0f" * 16,
        "name": "poems",
        "serving": True,
        "round": 8,
        "rounds": 30,
        "live": 1,
        "digest": "cd" * 16,
        "digest_round": 8,
        "members": [],
        "loss": 3.25,
        "rounds_per_s": 2.0,
        "alerts": [],
        "agents": [],
    },
    Status,
    strict=False,
)


def test_status_says_whose_weights_differed_and_from_where():
    member = msgspec.structs.replace(MEMBER, quarantined=True)
    lines = seen(
        status_view(changed(members=[member], alerts=["round 8: node 0 (a\x1bb): first different after 5"]))
    )
    assert any("ada" in line and "backward" in line and "quarantined" in line for line in lines)
    assert lines[-1] == "round 8: node 0 (a\ufffdb): first different after 5"


def changed(**values):
    return msgspec.structs.replace(STATUS, updated_at=time.time(), **values)


def seen(renderable, width=200):
    """What stands in a terminal of this width, line by line."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (5e12, "5000.0 GB")],
)
def test_bytes(count, text):
    assert si_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("speed", "text"), [(12.34, "12.3 rounds/s"), (0.025, "40 s a round")])
def test_pace(speed, text):
    assert pace(speed) == text


def test_the_live_line():
    line = status_line(changed(payload_bytes_up=1200, payload_bytes_down=99), "")
    assert line.plain == "round 8/30 · 1 live · loss 3.250 · up 1.2 kB down 99 B · 2.0 rounds/s, 11 s left"


def test_a_run_that_was_over_before_it_was_taken_back_has_nothing_left():
    line = status_line(changed(round=31, live=0), "round 31: all rounds are done").plain
    assert "left" not in line
    assert "waiting for nodes" not in line


def test_the_live_line_says_what_the_run_waits_for():
    assert status_line(changed(live=0), "").plain.endswith("waiting for nodes")
    waiting = status_line(
        changed(rounds_per_s=0.0), "round 8: waiting for a quorum (1 of 2 reported, quorum 2)"
    )
    assert waiting.plain.endswith("waiting for a quorum (1 of 2 reported, quorum 2)")


@pytest.mark.parametrize("width", [20, 40, 60])
def test_the_live_line_is_one_line_in_a_narrow_terminal(width):
    lines = seen(Group(status_line(changed(), "")), width)  # as Live renders it
    assert len(lines) == 1
    assert len(lines[0]) <= width


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_shows_the_whole_status(width):
    lines = seen(status_view(changed(members=[MEMBER])), width)
    assert all(len(line) <= width for line in lines)
    assert STATUS.digest in "".join(lines).replace("\n", "")
    assert any("ada" in line and "live" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"serving": False}, "not served"),
        ({"serving": True}, "being served"),
    ],
)
def test_whether_it_is_served(values, words):
    assert words in seen(status_view(changed(**values)))[0]


def test_a_coordinator_that_was_killed_is_not_shown_as_alive():
    old = msgspec.structs.replace(changed(), updated_at=time.time() - 300)
    assert "nothing heard of its coordinator for 5 min" in seen(status_view(old))[0]


@pytest.mark.parametrize("name", ["[red]x", "[/]", "\x1b[2Jx", "a\nb", "名前"])
def test_a_name_is_shown_as_it_is_and_obeyed_by_nobody(name):
    lines = seen(status_view(changed(members=[msgspec.structs.replace(MEMBER, name=name)])))
    assert len(lines) == len(seen(status_view(changed(members=[MEMBER]))))
    assert "\x1b[2J" not in "".join(lines)
    assert name[-1] in lines[-1]


def test_the_speed_is_of_the_recent_past():
    speed = Speed(0, 0.0)
    assert speed.rounds_per_s == 0.0
    now = 0.0
    for _ in range(100):  # 10 rounds a second …
        now += 1.0
        speed.observe(round(10 * now), now)
    assert speed.rounds_per_s == pytest.approx(10)
    for second in range(1, 41):  # … then 1
        speed.observe(1000 + second, now + second)
    assert speed.rounds_per_s == pytest.approx(1, rel=0.01)


def test_the_speed_of_slow_rounds_does_not_jump():
    assert SPEED_MEMORY_S < 60 * SPEED_MEMORY_ROUNDS
    speed = Speed(0, 0.0)
    seen_speeds = []
    for second in range(1, 3601):  # a round a minute, looked at every second
        speed.observe(second // 60, float(second))
        if second > 1200:
            seen_speeds.append(60 * speed.rounds_per_s)
    assert 0.85 < min(seen_speeds) <= max(seen_speeds) < 1.1
