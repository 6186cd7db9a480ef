"""The squeezing benchmark: every row is smaller than what it began with, and real ledgers are read."""

import json

import pytest

from benchmarks import squeezing
from coordinator.config import ServiceConfig
from coordinator.rundir import RunDirectory
from zo.commit import decode_entry
from zo.replica import Replica
from zo.weights import zeros


def test_what_travels_is_never_longer_than_the_whole(monkeypatch, capsys):
    monkeypatch.setattr(squeezing, "SHAPES", ((4, 1), (16, 8)))
    assert squeezing.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["what"] for row in rows[:3]] == ["4 × 1, 8 bit", "4 × 1, 4 bit", "4 × 1, 1 bit"]
    assert all(max(row["live"], row["history"]) < row["whole"] for row in rows)


def test_the_ledger_of_a_run_is_a_row(tmp_path, make_manifest, capsys):
    manifest = make_manifest(rounds=2000)
    directory = RunDirectory(tmp_path / "mine")
    directory.create(manifest, ServiceConfig(), Replica(manifest, zeros(500)))
    with pytest.raises(SystemExit, match="2"):
        squeezing.main([str(directory.path)])
    assert "has no rounds yet" in capsys.readouterr().err
    with directory.ledger(manifest) as ledger:
        for frame in squeezing.gaussian_chain(4, 2, 8):
            ledger.append(decode_entry(frame), frame)
        ledger._db.execute("UPDATE commits SET round = round - ?", (squeezing.FIRST_ROUND,))
    assert squeezing.main([str(directory.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| mine | 4")
