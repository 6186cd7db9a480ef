"""The benchmark of directions runs every policy and width, and goes on where it was stopped."""

import json

from benchmarks import directions


def test_quick_runs_all_and_goes_on_after_what_is_done(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    assert directions.main(["--quick", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    by_name = {row["variant"]: row for row in rows}
    assert set(by_name) == set(directions.VARIANTS)
    assert all(row["forwards"] == 4 * 6 * 2 for row in rows)
    assert by_name["private, 1 bit"]["code_bytes_up"] == 4 * 6 // 8
    shared, private = by_name["shared, majority, 1 bit"], by_name["private, 8 bits"]
    assert shared["ledger_bytes"] < private["ledger_bytes"]
    assert len({row["held_out_end"] for row in rows}) > 1
    capsys.readouterr()
    out.write_text(json.dumps(json.loads(out.read_text()) | {"rows": rows[1:]}))
    ran = []
    measured = directions.measured
    monkeypatch.setattr(directions, "measured", lambda *given: ran.append(given[0]) or measured(*given))
    assert directions.main(["--quick", "--out", str(out)]) == 0
    assert ran == ["private, 8 bits"]
    again = {row["variant"]: row["held_out_end"] for row in json.loads(out.read_text())["rows"]}
    assert again == {row["variant"]: row["held_out_end"] for row in rows}, "the same run again is the same"
    assert directions.main(["--quick", "--seed", "2", "--out", str(out)]) == 3
