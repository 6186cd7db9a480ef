"""The benchmark of poisoning: what its attackers send, and what its page says. Nothing is trained here."""

import dataclasses

import numpy as np
import pytest

from benchmarks import poisoning
from benchmarks.poisoning import ATTACKS, BOUNDED, CAPPED, FAULTY, RUNS, Row
from benchmarks.recipes.swarm import Swarm
from zo.codes import NO_VOTE

SETTINGS = Swarm(rounds=2, directions=3, sides=2, step=0.3, epsilon=0.01)


def test_what_attackers_make_of_honest_codes():
    codes = np.array([32, -127, 0, NO_VOTE], np.int8)
    assert ATTACKS["inverted"](codes).tolist() == [-32, 127, 0, NO_VOTE]
    assert ATTACKS["constant"](codes).tolist() == [32] * 4
    assert ATTACKS["maximal"](codes).tolist() == [-127, 127, 127, 127]
    assert ATTACKS["none"](codes) is codes


def test_what_a_broken_machine_answers_is_as_wrong_as_what_it_reports():
    assert poisoning._lie("inverted", (4.5, 4.25)) == (4.25, 4.5)
    assert poisoning._lie("constant", (4.5, 4.25)) == (1.0, 1.0)


def test_the_attackers_share_is_of_the_squared_length():
    codes = np.array([[30, 40], [NO_VOTE, 50]], np.int8)
    assert poisoning._share(codes, [False, True]) == pytest.approx(0.5)


def row(attack, defence, end, found=None):
    return Row(
        key=f"{attack}, {defence.name}",
        attack=attack,
        defence=defence.name,
        rounds=2,
        points=[(0, 0.7, 0.5), (2, end, 0.25)],
        found=found or {},
        shares=[0.25, 0.5],
        seconds=1.0,
        date="2026-11-20",
        commit="c0ffee",
        cpu="a processor",
    )


ROWS = [
    row("none", CAPPED, 0.5),
    row("inverted", BOUNDED, 0.7),
    row("inverted", FAULTY, 0.55, {13: 40, 2: 41}),
]


def test_rows_survive_their_file(tmp_path):
    path = tmp_path / "results" / "poisoning.json"
    assert poisoning.load(path) == []
    poisoning.save(path, ROWS)
    assert poisoning.load(path) == ROWS


def test_the_page_says_what_is_left_and_who_was_found(tmp_path):
    page = poisoning.page(ROWS, [], SETTINGS, "python -m benchmarks.poisoning")
    assert "| inverted | codes are bounded | 0.700 | 25.0% | 0% | 38% | – |" in page
    assert "0.550 | 25.0% | 75% | 38% | 2: 40, 41 |" in page
    assert "Honest nodes that were found in any of these runs: 1." in page
    poisoning.plot(ROWS, tmp_path / "poisoning.png")
    assert (tmp_path / "poisoning.png").stat().st_size > 1000


def test_of_shared_directions_the_page_says_how_far_above_the_honest_swarm_attackers_bring_it():
    name = next(iter(poisoning.POLICIES))
    shared = [
        dataclasses.replace(row(attack, CAPPED, 0.6), policy=name, points=[(0, 0.7, 0.5), (2, 0.6, error)])
        for attack, error in (("none", 0.3), ("inverted", 0.32), ("maximal", 0.33))
    ]
    page = poisoning.page(ROWS, shared, SETTINGS, "python -m benchmarks.poisoning")
    assert f"| {name} | what they should | 0.600 | 30.0% | – | |" in page
    assert f"| {name} | inverted | 0.600 | 32.0% | +2.0 points | met |" in page
    assert f"| {name} | maximal | 0.600 | 33.0% | +3.0 points | **not met** |" in page


def test_every_run_is_one():
    assert len(set(RUNS)) == len(RUNS)
    assert {attack for attack, _ in RUNS} == ATTACKS.keys()
