"""The benchmark of error feedback: it learns at all, and every row has its figures."""

import json

import pytest

from benchmarks import feedback


def test_the_loss_falls_and_without_rounding_there_is_next_to_nothing_to_feed_back():
    none, following = (feedback.share_left(kind, 0, 8, 0.0024, 60, 0) for kind in ("none", "next"))
    assert none < 0.9
    assert following == pytest.approx(none, rel=0.02)


def test_every_row_has_its_figures(monkeypatch, capsys):
    monkeypatch.setattr(feedback, "SEEDS", 1)
    monkeypatch.setattr(feedback, "STEPS", (0.0012,))
    assert feedback.main(["--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["pool"], row["bits"]) for row in rows[:4]] == [(0, 8), (0, 4), (0, 1), (1024, 8)]
    assert "index" in rows[3]
    assert "index" not in rows[0]
    assert len(feedback.markdown(rows).splitlines()) == 11
