"""Rows of results on disk, and what the benchmarks that keep them say of a file that is none."""

import pytest

from benchmarks import directions, learning, poisoning, rows


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "rows.json"
    assert rows.read(path, dict) == []
    rows.write(path, [{"key": "a", "points": [1, 2.5]}, {"key": "b"}])
    assert rows.read(path, lambda row: row["key"]) == ["a", "b"]
    rows.write(path, iter([{"key": "c"}]))
    assert rows.read(path, dict) == [{"key": "c"}]
    assert [each.name for each in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": 5}', '{"rows": [7]}', '{"rows": [{}]}', '{"other": []}']
)
def test_a_file_of_something_else_is_named_and_left_alone(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(
        rows.ResultsError, match=r"rows\.json holds no results \(.*remove it, or name another --out"
    ):
        rows.read(path, lambda row: row["key"])
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda folder: directions.main(["--quick", "--out", folder]), "directions-quick.json"),
        (lambda folder: learning.main(["--recipe", "1", "--quick", "--out", folder]), "recipe-1-quick.json"),
        (lambda folder: poisoning.main(["--quick", "--out", folder]), "poisoning-quick.json"),
    ],
    ids=["directions", "learning", "poisoning"],
)
def test_a_benchmark_ends_with_one_line_and_the_code_of_bad_input(tmp_path, capsys, run, name):
    (tmp_path / name).write_text('{"rows": [{"key": "of something else"}]}')
    try:
        code = run(str(tmp_path))
    except SystemExit as ended:
        code = ended.code
    assert code == 3
    assert f"{name} holds no results" in capsys.readouterr().err.replace("\n", "")
