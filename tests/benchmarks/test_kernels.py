"""The kernel benchmark: what its one JSON object holds, and the page it writes."""

import json

import pytest

from benchmarks import kernels as benchmark
from benchmarks import machine
from zo import kernels


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "MILLION", 10_000)
    monkeypatch.setattr(benchmark, "SAMPLE_S", 0.0)
    yield
    kernels.set_threads(machine.num_cores())


def test_json_is_one_object_with_the_promised_keys(capsys):
    assert benchmark.main(["--json", "--quick"]) == 0
    figures = json.loads(capsys.readouterr().out)
    for name in (
        "apply_param_directions_per_s",
        "perturbed_params_per_s",
        "digest_bytes_per_s",
        "codes_per_s",
    ):
        assert figures[name] > 0
    assert figures["ratio_to_torch_normal"] is None or figures["ratio_to_torch_normal"] > 0
    assert figures["num_cores"] >= 1
    assert set(figures) >= {"cpu", "commit", "command", "python_version", "numpy_version", "numba_version"}
    assert all(case["best"] >= case["median"] and case["turns"] == 5 for case in figures["cases"].values())


def test_without_torch_its_figures_are_null(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "torch_case", lambda *_: None)
    benchmark.main(["--json", "--quick"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio_to_torch_normal"] is None
    assert figures["torch_normal_param_directions_per_s"] is None
    assert "torch" not in figures["cases"]


def test_results_are_written_as_json_and_as_a_page(tmp_path, capsys):
    benchmark.main(["--quick", "--out", str(tmp_path / "new")])
    assert "apply" in capsys.readouterr().out
    figures = json.loads((tmp_path / "new" / "kernels.json").read_text())
    page = (tmp_path / "new" / "kernels.md").read_text()
    assert figures["command"] in page
    assert all(case["name"] in page for case in figures["cases"].values())
