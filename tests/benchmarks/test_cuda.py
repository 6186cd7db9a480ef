"""What the benchmark of GPUs says without one, and its page."""

from dataclasses import replace

import torch

from benchmarks import cuda, rows
from benchmarks.cuda import Case, Row, keep, main, markdown
from node import embedded


def test_without_a_gpu_there_is_nothing_to_measure(capsys):
    assert main([]) == 3
    assert "so there is nothing to measure; run it where there is a GPU" in capsys.readouterr().err


def test_a_processor_is_measured_by_the_same_code():
    case = Case(
        model=str(embedded.path()),
        quantize="none",
        dtype="float32",
        rank=2,
        batch=(1, 16),
        directions=2,
        turns=2,
    )
    threads = torch.get_num_threads()
    try:
        one, again = (cuda._on("cpu", case, 1) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert (one.losses == again.losses).all()
    assert one.losses.shape == (4,)
    assert one.round_over_forward > 1
    assert one.ms > 0


ROW = Row(
    model="a",
    quantize="nf4",
    dtype="bfloat16",
    parameters=1_000_000,
    batch="8 × 128",
    cpu_ms=50.0,
    gpu_ms=10.0,
    gpu_one_by_one_ms=20.0,
    gpu_at_once=4,
    gpu_round_over_forward=1.02,
    losses_differ=1e-3,
    slopes_correlate=0.99,
    repeat=0.0,
    memory_per_parameter=4.0,
    gpu="g",
    cpu="p",
    threads=2,
    torch="2",
    bitsandbytes="0",
    commit="e",
    date="d",
)


def test_the_page_leaves_out_what_was_not_measured():
    alone = replace(ROW, cpu_ms=None, losses_differ=None, slopes_correlate=None, gpu_at_once=0)
    both, one, *_ = markdown([ROW, alone]).splitlines()[6:]
    assert "| 50.0 ms | 10.00 ms, 5.0× | 20.00 ms | 4 | 1.020 | 0.001 | 0.9900 | 0 | 4.0 |" in both
    assert "|  | 10.00 ms | 20.00 ms | a view | 1.020 |  |  | 0 | 4.0 |" in one


def test_rows_are_kept_and_read_again(tmp_path):
    keep(tmp_path, [ROW])
    assert rows.read(tmp_path / "cuda.json", lambda row: Row(**row)) == [ROW]
    assert "one g, and p with 2 threads" in (tmp_path / "cuda.md").read_text("utf-8")
