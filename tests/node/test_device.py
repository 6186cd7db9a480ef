"""Where a model computes, and in what: names of devices, other dtypes, and that nothing is computed elsewhere."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.data import Batch, Windows
from node.device import DeviceError, device_of
from node.labelled import Labelled
from node.losses import mean_loss, row_losses
from node.probe import Probe
from node.quantization import Form, loading_options
from node.stacked import side_by_side
from zo.initial import initial_weights

TARGETS = ("q_proj", "down_proj")


def adapted(**form):
    base = load_base(embedded.path(), threads=1, **form)
    return Adapter(base, key=(7, 8), targets=TARGETS, rank=2, alpha=4, train="AB")


def make_windows(length=12):
    tokens = np.random.default_rng(0).integers(2, 500, (6, length)).astype(np.int32)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


def make_probe(adapter, **more):
    return Probe(
        adapter, make_windows(), key=(7, 8), epsilon=0.02, directions=3, batch_size=2, seed=1, **more
    )


def some_weights(adapter):
    return np.random.default_rng(3).integers(-(2**24), 2**24, adapter.size).astype(np.int32)


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "CPU", "mps", ""])
def test_a_name_that_is_no_device(name):
    with pytest.raises(DeviceError, match=f"--device {name}: expected cpu, cuda, cuda:N or auto"):
        device_of(name)


def test_what_a_device_is_depends_on_the_gpus_there_are(monkeypatch):
    assert device_of("cpu") == torch.device("cpu")
    for num_gpus, auto in ((0, "cpu"), (2, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=num_gpus: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=num_gpus: count)
        assert device_of("auto") == torch.device(auto)
        with pytest.raises(DeviceError, match="--device cuda:2: torch "):
            device_of("cuda:2")
    assert (device_of("cuda"), device_of("cuda:1")) == (torch.device("cuda:0"), torch.device("cuda:1"))


def test_a_base_on_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(DeviceError, match="use --device cpu"):
        load_base(embedded.path(), device="cuda")


def test_four_bits_take_any_shape_on_a_gpu():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(embedded.path())
    config.intermediate_size = 172
    folder = embedded.path()
    with pytest.raises(ValueError, match="has 172 inputs; 4-bit on CPU"):
        loading_options(folder, AutoModelForCausalLM, config, Form("nf4"))
    options = loading_options(folder, AutoModelForCausalLM, config, Form("nf4", (), "bfloat16", "cuda:1"))
    assert options["device_map"] == {"": "cuda:1"}
    assert options["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_sixteen_bits_trains_a_float32_adapter(dtype):
    adapter, exact = adapted(dtype=dtype), adapted()
    assert {p.dtype for p in adapter.model.parameters()} == {torch.float32, getattr(torch, dtype)}
    assert adapter.views.dtype == torch.float32
    weights = some_weights(adapter)
    rounded = make_probe(adapter).slopes(weights, 0, 1)
    precise = make_probe(exact).slopes(weights, 0, 1)
    assert rounded[1] == pytest.approx(precise[1], rel=0.01)
    assert rounded[1] != precise[1]
    together = make_probe(adapter, at_once=3).slopes(weights, 0, 1)
    assert together[1] == pytest.approx(rounded[1], rel=2e-3)


def test_a_head_is_float32_on_a_base_in_sixteen_bits(encoder):
    base = load_base(encoder, threads=1, dtype="bfloat16", labels=("0", "1"))
    adapter = Adapter(base, key=(7, 8), targets=("query",), rank=2, alpha=4, train="B")
    rows = Labelled(
        tokens=np.random.default_rng(0).integers(2, 50, (4, 9)).astype(np.int32),
        lengths=np.array([9, 5, 7, 9]),
        labels=np.array([0, 1, 0, 1]),
        words=None,
        names=("0", "1"),
        padding=base.padding,
        sequence_length=9,
        num_cut=0,
        num_tokens_cut=0,
    )
    weights = initial_weights(adapter.layout, (7, 8), "B")
    losses = [
        Probe(
            adapter, rows, key=(7, 8), epsilon=0.1, directions=2, batch_size=4, seed=1, at_once=at_once
        ).slopes(weights, 0, 1)[1]
        for at_once in (0, 2)
    ]
    assert losses[0] == pytest.approx(np.log(2), abs=0.3)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_views_that_are_copied_to_a_device_give_the_codes_of_views_that_are_there():
    """As on a GPU: what kernels write and what the model reads are not the same memory."""
    adapter = adapted()
    weights = some_weights(adapter)
    expected = {at_once: make_probe(adapter, at_once=at_once).probe(weights, 4, 1, -4) for at_once in (0, 2)}
    adapter.hold(4)
    assert np.shares_memory(adapter.views.numpy(), adapter.host)
    adapter._on_host = adapter.views.clone()
    adapter.host = adapter._on_host.numpy()
    for at_once, before in expected.items():
        probed = make_probe(adapter, at_once=at_once).probe(weights, 4, 1, -4)
        assert np.array_equal(probed.codes, before.codes)
        assert probed.loss == before.loss
    assert probed.codes.any()


@pytest.mark.parametrize("is_stacked", [False, True])
def test_everything_up_to_the_losses_is_computed_where_the_base_is(is_stacked, monkeypatch):
    """On the meta device: mixing with tensors of the host is an error there, and so is reading a value, at the end."""
    # transformers reads one value itself, to see whether rows are packed.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)
    base = load_base(embedded.path(), threads=1)
    base.model.to("meta")
    adapter = Adapter(base, key=(7, 8), targets=TARGETS, rank=2, alpha=4, train="B")
    adapter.hold(2)
    assert adapter.views.device.type == "meta"
    assert {parameter.device.type for parameter in adapter.model.parameters()} == {"meta"}
    adapter.push()
    batch = Batch(make_windows().tokens[:2].astype(np.int64))
    with (
        side_by_side(adapter, 2) if is_stacked else nullcontext(),
        pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"),
    ):
        row_losses(adapter.model, batch)


def test_the_loss_in_sixteen_bits_is_near_that_of_the_base():
    drawn = Batch(make_windows().tokens.astype(np.int64))
    exact = mean_loss(load_base(embedded.path(), threads=1).model, drawn)
    assert mean_loss(load_base(embedded.path(), threads=1, dtype="bfloat16").model, drawn) == pytest.approx(
        exact, rel=0.01
    )
