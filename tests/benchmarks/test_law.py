"""The law of a direction's gain: its terms on a loss where they are known, and the command."""

import numpy as np
import pytest

from benchmarks import law
from benchmarks.law import Point
from node import embedded


def test_gain_and_step_are_those_of_a_quadratic():
    """E[L(w − s (gᵀz/rms) z)] = L − s |g|²/rms + s²/2 · tr H, for the mean over z, is lowest at the best step."""
    point = Point(loss=3.0, gradient_square=0.5, noise=1.5, curvature=200.0)
    rms = 2.0**0.5

    def lowered(step):
        return step * 0.5 / rms - step**2 / 2 * 200.0

    assert lowered(point.step()) == pytest.approx(point.gain())
    steps = point.step() * np.linspace(0.5, 1.5, 21)
    assert max(map(lowered, steps)) == pytest.approx(lowered(point.step()))
    assert point.gain(4) == pytest.approx(point.gain() * 2.0 / 0.875)


def test_it_measures_before_and_after_training(tmp_path, capsys):
    data = tmp_path / "text.txt"
    data.write_text("The cat sat on the mat, and the dog lay down beside it to sleep. " * 200)
    how = ["--rounds", "2", "--batch-size", "2", "--sequence-length", "16"]
    assert law.main(["--model", str(embedded.path()), "--data", str(data), *how]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["start", "after 64 passes"]
    noise, curvature = (float(each) for each in lines[2].split("|")[4:6])
    assert noise > 0
    assert np.isfinite(curvature)
    assert curvature  # of either sign: no minimum is near
