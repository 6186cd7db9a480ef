"""What a demo removes before it begins."""

import pytest

from node import demo


def test_only_a_demo_is_removed_for_the_next_one(tmp_path):
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    (mine / "data" / "rows.csv").write_text("1,2")
    with pytest.raises(demo.DemoError, match="holds something else than a demo"):
        demo._prepare(mine)
    assert (mine / "data" / "rows.csv").read_text() == "1,2"
    for _ in range(2):
        demo._prepare(tmp_path / "demo")
        assert (tmp_path / "demo" / "data" / "held-out.txt").exists()
        assert not (tmp_path / "demo" / "left").exists()
        (tmp_path / "demo" / "left").touch()
