"""The same code on a GPU: what it computes there is what a CPU computes, nearly, and what it takes there is told.

Only with `make test-cuda`; what `tests/node/test_device.py` asks of devices runs anywhere.
"""

import numpy as np
import pytest
import torch

from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.completions import read_completions
from node.data import Batch, Windows
from node.doctor import available_bytes
from node.doctor import device as device_finding
from node.language import LanguageTrainer
from node.losses import mean_loss_over, row_losses
from node.memory import PROBING, OutOfMemoryError, memory_explained
from node.objectives import objective
from node.probe import Probe
from node.rehearsal import rehearse
from zo.directions import Direction
from zo.layout import lora_layout
from zo.manifest import Task

pytestmark = pytest.mark.cuda

KEY = (7, 8)
TARGETS = ("q_proj", "v_proj", "down_proj")
NEAR_BY_KIND = {"none": 1e-4, "int8": 1e-2, "nf4": 1e-2, "fp4": 1e-2}
"""By how much of itself a loss differs between the devices at most: each has kernels of its own for few bits."""


def adapted(device="cuda", **form):
    base = load_base(embedded.path(), threads=1, device=device, **form)
    return Adapter(base, key=KEY, targets=TARGETS, rank=4, alpha=8, train="AB")


def make_windows(rows=6, length=24):
    tokens = np.random.default_rng(0).integers(2, 500, (rows, length)).astype(np.int32)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


def make_probe(adapter, windows=None, **more):
    return Probe(
        adapter,
        windows or make_windows(),
        **{"key": KEY, "epsilon": 0.02, "directions": 4, "batch_size": 2, "seed": 1, **more},
    )


def some_weights(adapter):
    return np.random.default_rng(3).integers(-(2**24), 2**24, adapter.size).astype(np.int32)


@pytest.mark.parametrize("kind", NEAR_BY_KIND)
def test_losses_and_slopes_are_nearly_those_of_a_cpu(kind):
    there, here = adapted(quantize=kind), adapted("cpu", quantize=kind)
    assert there.views.is_cuda
    weights = some_weights(here)
    names = [Direction(1, sample) for sample in range(16)]
    (slopes, losses), (known_slopes, known) = (
        make_probe(each).slopes_along(weights, names) for each in (there, here)
    )
    assert losses == pytest.approx(known, rel=NEAR_BY_KIND[kind])
    assert np.corrcoef(slopes, known_slopes)[0, 1] > (0.999 if kind == "none" else 0.8)


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("sides", [1, 2])
def test_views_that_share_a_pass_have_the_losses_that_they_have_one_by_one(kind, sides):
    adapter = adapted(quantize=kind)
    weights = some_weights(adapter)
    alone, together = (
        make_probe(adapter, sides=sides, at_once=at_once).slopes(weights, 0, 1)[1] for at_once in (0, 4)
    )
    assert together == pytest.approx(alone, rel=NEAR_BY_KIND[kind])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_sixteen_bits_trains_a_float32_adapter(dtype):
    adapter = adapted(dtype=dtype)
    assert adapter.views.dtype == torch.float32
    rounded = make_probe(adapter).slopes(some_weights(adapter), 0, 1)[1]
    assert rounded == pytest.approx(make_probe(adapted()).slopes(some_weights(adapter), 0, 1)[1], rel=0.01)


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_forward_and_backward_slopes_are_those_of_differences(kind):
    adapter = adapted(quantize=kind)
    weights = some_weights(adapter)
    names = [Direction(1, sample) for sample in range(8)]
    found = {}
    for estimator in ("two-sided", "forward"):
        probe = make_probe(adapter, epsilon=0.01)
        probe.estimator = estimator
        found[estimator] = probe.slopes_along(weights, names)[0]
    # The gradient is of one batch for all of them, so it is compared where there is only one.
    one = make_probe(adapter, batch_size=6)
    one.estimator = "backward"
    backward = one.slopes_along(weights, names)[0]
    one.estimator = "forward"
    assert backward == pytest.approx(one.slopes_along(weights, names)[0], rel=1e-2, abs=1e-3)
    assert np.corrcoef(found["forward"], found["two-sided"])[0, 1] > 0.95


def test_a_node_rehearses_moves_and_measures(make_manifest):
    base = load_base(embedded.path(), threads=1, device="auto", quantize="nf4")
    layout = lora_layout(base.linear_shapes, TARGETS, 4, "AB", None)
    manifest = make_manifest(
        targets=TARGETS,
        size=layout.size,
        layout_digest=layout.digest().hex(),
        train="AB",
        directions=4,
        projections=64,
        updates=3,
        rate=0.01,
        batch_size=2,
        digest=base.digest,
        tokenizer_digest=base.tokenizer_digest,
    )
    trainer = LanguageTrainer(manifest, base, make_windows(), make_windows(), private_seed=5, threads=1)
    found = trainer.rehearse()
    assert found.signal > 0
    assert found.at_once > 0, "a small base on a GPU is bound by launches"
    trainer.choose_estimator("moves", found)
    assert trainer.estimator == "moves"


def test_what_repeats_exactly_has_no_noise_and_the_rehearsal_says_how_much_there_is():
    probe = make_probe(adapted(), make_windows(16))
    found = rehearse(probe, some_weights(probe.adapter))
    assert found.repeat < 1e-4 * found.signal
    assert not found.warning


def test_an_objective_that_generates(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "Return the", "completion": " value."}\n{"prompt": "A", "completion": " b"}\n'
    )
    base = load_base(embedded.path(), threads=1, device="cuda")
    read = read_completions([rows], base.tokenizer, 24)
    task = Task(kind="completion", objective="token-f1", max_new_tokens=4)
    adapter = Adapter(base, key=KEY, targets=TARGETS, rank=2, alpha=4, train="B")
    judged = objective(task, base, read)(adapter.model, read.take(np.arange(2)))
    assert ((judged.sums >= 0) & (judged.sums <= 1)).all()


def test_memory_is_what_inference_takes_and_the_views():
    """The promise: inference, 12 B for each parameter of the adapter, and a batch's activations."""
    adapter = adapted()
    adapter_bytes = 12 * adapter.size
    windows = make_windows(64, 128)
    batch = Batch(windows.tokens.astype(np.int64))

    def peak(do):
        do()  # what libraries keep is there from the first time on
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        do()
        return torch.cuda.max_memory_allocated()

    inference = peak(lambda: row_losses(adapter.model, batch)) - adapter.views.nbytes
    probe = make_probe(adapter, windows, batch_size=64, directions=8)
    weights = some_weights(adapter)
    assert peak(lambda: probe.slopes(weights, 0, 1)) <= inference + adapter_bytes


def test_too_large_a_batch_is_refused_in_words():
    adapter = adapted()
    rows = make_windows(256, 256)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(128 * 2**20 / total)
    try:
        with (
            pytest.raises(OutOfMemoryError, match="join with --at-once 0"),
            memory_explained("here", PROBING),
        ):
            make_probe(adapter, rows, batch_size=256).slopes(some_weights(adapter), 0, 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert np.isfinite(mean_loss_over(adapter.model, make_windows(), batch_size=2))


def test_the_doctor_knows_the_device_and_its_memory():
    found = device_finding("auto")
    assert (found.state, torch.cuda.get_device_name(0) in found.found) == ("ok", True)
    assert 0 < available_bytes("cuda") <= torch.cuda.get_device_properties(0).total_memory
