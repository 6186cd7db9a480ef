import importlib
import json

import pytest
from rich.table import Table

from benchmarks.command import add_json, add_out, command_line, deliver

COMMANDS = [
    "attacks",
    "cuda",
    "directions",
    "feedback",
    "fuzz",
    "join",
    "kernels",
    "law",
    "learning",
    "light_node",
    "poisoning",
    "privacy",
    "probing",
    "round",
    "soak",
    "soak_node",
    "squeezing",
    "wire_table",
]
FIGURES = {"rows": [{"what": "a", "bytes": 3}]}
PAGE = "| what | bytes |\n|---|--:|\n| a | 3 |\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_explains_itself_in_a_narrow_terminal(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert lines[0].startswith(f"usage: python -m benchmarks.{name}")
    assert all(len(line) <= 60 for line in lines if not line.startswith("    "))


def options(*arguments):
    line = command_line("some", "Some figures.")
    add_json(line)
    add_out(line, "some.json and some.md")
    return line.parse_args(arguments)


def shown():
    table = Table("what", "bytes")
    table.add_row("a", "3")
    return table


def test_figures_are_shown_and_kept_only_if_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    deliver("some", FIGURES, PAGE, options(), shown())
    assert "│ a    │ 3" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    deliver("some", FIGURES, PAGE, options("--out", "new/place"), PAGE)
    assert capsys.readouterr().out == PAGE
    assert (tmp_path / "new/place/some.md").read_text("utf-8") == PAGE
    assert json.loads((tmp_path / "new/place/some.json").read_text("utf-8")) == FIGURES


def test_json_is_printed_instead_and_out_has_a_place_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    deliver("some", FIGURES, PAGE, options("--json", "--out"), shown())
    assert json.loads(capsys.readouterr().out) == FIGURES
    assert sorted(path.name for path in (tmp_path / "docs/results").iterdir()) == ["some.json", "some.md"]
