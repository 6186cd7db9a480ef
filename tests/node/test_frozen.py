"""The frozen part of a model is computed once for a batch, and nothing else changes."""

from collections import deque

import numpy as np
import pytest
import torch

from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.frozen import frozen_backbone, once_per_batch
from node.labelled import Labelled
from node.probe import Probe

KEY = (17, 4)


@pytest.fixture(scope="module")
def adapter():
    base = load_base(embedded.path(), threads=1, labels=("no", "yes"))
    return Adapter(base, key=KEY, targets=(), rank=2, alpha=4, train="B")


@pytest.fixture
def passes(adapter, monkeypatch):
    """How often the backbone was really computed: a list of batch sizes."""
    seen = []
    layer = adapter.model.get_submodule("model.layers.0")
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    hook.remove()


def rows(seed=0, num_rows=6):
    rng = np.random.default_rng(seed)
    return Labelled(
        tokens=rng.integers(2, 500, (num_rows, 9)).astype(np.int32),
        lengths=np.full(num_rows, 9),
        labels=rng.integers(0, 2, num_rows),
        words=None,
        names=("no", "yes"),
        padding=0,
        sequence_length=9,
        num_cut=0,
        num_tokens_cut=0,
    )


def make_probe(adapter, sides):
    return Probe(adapter, rows(), key=KEY, epsilon=0.01, directions=3, batch_size=4, seed=9, sides=sides)


def test_what_lies_on_top_of_the_backbone_leaves_it_frozen(adapter):
    assert frozen_backbone(adapter) is adapter.model.model


@pytest.mark.parametrize("targets", [("q_proj",), ("layers.1.mlp.up_proj",)])
def test_an_adapter_inside_leaves_nothing_to_keep(targets):
    base = load_base(embedded.path(), threads=1)
    assert frozen_backbone(Adapter(base, key=KEY, targets=targets, rank=2, alpha=4, train="B")) is None


@pytest.mark.parametrize(("sides", "expected"), [(1, 1), (2, 3)])
def test_every_batch_is_computed_once(adapter, passes, sides, expected):
    """One-sided, all directions share a batch; two-sided, both views of each."""
    weights = np.zeros(adapter.size, np.int32)
    probed = make_probe(adapter, sides).probe(weights, 0, 0, -4)
    assert passes == [4] * expected
    assert len(set(probed.codes.tolist())) > 1


def test_rows_that_are_all_in_every_batch_are_computed_once_for_all_rounds(adapter, passes):
    probe = Probe(adapter, rows(), key=KEY, epsilon=0.01, directions=2, batch_size=6, seed=9)
    found = [probe.probe(np.zeros(adapter.size, np.int32), number, 0, -4).codes for number in range(3)]
    assert passes == [6]
    assert len({codes.tobytes() for codes in found}) > 1


@pytest.mark.parametrize("sides", [1, 2])
def test_the_losses_are_those_of_whole_passes(adapter, monkeypatch, sides):
    weights = np.random.default_rng(1).integers(-(2**24), 2**24, adapter.size).astype(np.int32)
    kept = make_probe(adapter, sides).probe(weights, 3, 1, -4)
    monkeypatch.setattr("node.probe.frozen_backbone", lambda _: None)
    whole = make_probe(adapter, sides).probe(weights, 3, 1, -4)
    assert np.array_equal(kept.codes, whole.codes)
    assert kept.loss == whole.loss


def test_another_batch_or_mask_is_computed_anew(adapter, passes):
    model, backbone = adapter.model, adapter.model.model
    ids = torch.arange(4, 12).reshape(1, 8)
    mask = torch.ones_like(ids)
    with torch.inference_mode(), once_per_batch(backbone):
        first = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(input_ids=ids.clone(), attention_mask=mask).logits, first)
        assert len(passes) == 1
        other = model(input_ids=ids + 1, attention_mask=mask).logits
        shorter = mask.clone()
        shorter[0, 6:] = 0
        model(input_ids=ids + 1, attention_mask=shorter)
        assert len(passes) == 3
        assert not torch.equal(other, first)
        again = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(again, first)
    assert len(passes) == 4


def test_nothing_is_kept_afterwards(adapter, passes):
    ids = torch.arange(4, 12).reshape(1, 8)
    for _ in range(2):
        with torch.inference_mode(), once_per_batch(adapter.model.model):
            adapter.model(input_ids=ids)
    with pytest.raises(RuntimeError), once_per_batch(adapter.model.model):
        raise RuntimeError
    adapter.model(input_ids=ids)
    adapter.model(input_ids=ids)
    assert len(passes) == 4
    assert "forward" not in vars(adapter.model.model)


def test_answers_that_somebody_keeps_outlast_it_and_what_lies_within(adapter, passes):
    model, backbone, known = adapter.model, adapter.model.model, deque(maxlen=2)
    batches = [torch.arange(first, first + 8).reshape(1, 8) for first in (4, 5, 6)]
    with torch.inference_mode():
        for _ in range(2):
            with once_per_batch(backbone, known):
                for ids in batches[:2]:
                    with once_per_batch(backbone):
                        model(input_ids=ids)
        assert len(passes) == 2
        with once_per_batch(backbone, known):
            model(input_ids=batches[2])  # there was room for two
            model(input_ids=batches[1])
            assert len(passes) == 3
            model(input_ids=batches[0])
    assert len(passes) == 4


def test_an_answer_kept_from_inference_serves_a_gradient_above_it(adapter, passes):
    known = deque()
    ids = torch.from_numpy(rows().tokens.astype(np.int64))
    head = adapter.model.get_submodule(adapter.paths["head"]).weight
    with once_per_batch(frozen_backbone(adapter), known):
        with torch.inference_mode():
            expected = adapter.model(input_ids=ids).logits
        with torch.enable_grad():
            head.requires_grad_(True)
            found = adapter.model(input_ids=ids).logits
            (gradient,) = torch.autograd.grad(found.sum(), head)
            head.requires_grad_(False)
    assert torch.equal(found, expected)
    assert gradient.abs().sum() > 0
    assert passes == [6]
