"""The wire benchmark: real sockets, figures that agree with the meter, and the keys that its JSON promises."""

import json

import pytest

from benchmarks import wire_table
from transport.meter import zmtp_bytes


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(wire_table, "DIRECTIONS", (1, 64))
    monkeypatch.setattr(wire_table, "NODES", (2,))


def test_json_is_one_object_with_the_promised_keys(capsys):
    assert wire_table.main(["--json", "--rounds", "2", "--pause-ms", "0"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [(row["nodes"], row["directions"]) for row in figures["rounds"]] == [(2, 1), (2, 64)]
    for row in [*figures["rounds"], *figures["session"]]:
        for way in ("up", "down"):
            assert row[f"payload_{way}"] <= row[f"zmtp_{way}"] <= row[f"wire_{way}"]
    lone, many = figures["rounds"]
    assert lone["zmtp_up"] == zmtp_bytes(lone["payload_up"])
    assert many["payload_up"] <= 70
    assert many["wire_up_per_direction"] < lone["wire_up_per_direction"]
    assert figures["session"][0]["what"] == "handshake"
    assert set(figures) >= {"commit", "command", "cpu", "pyzmq_version", "float32"}


def test_the_tables_have_a_row_for_each_measurement(capsys):
    wire_table.main(["--rounds", "1", "--pause-ms", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 2 |") for line in lines) == 2
    assert sum("float32" in line for line in lines) == 1


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--pause-ms", "-1"], ["--idle-s", "-1"]])
def test_impossible_arguments_are_usage_errors(arguments):
    with pytest.raises(SystemExit, match="2"):
        wire_table.main(arguments)
