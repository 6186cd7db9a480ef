"""Views side by side in one forward pass against PEFT's own forward, one view at a time."""

import contextlib

import numpy as np
import pytest
import torch
import transformers

from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.completions import arrange, completion_ids, prompt_ids
from node.data import Batch, LabelledBatch, Pair, stacked
from node.generation import continuations
from node.losses import row_losses
from node.objectives import Judged
from node.probe import Probe
from node.scores import by_words, exact_match, token_f1
from node.stacked import frozen_layers, side_by_side
from zo import kernels
from zo.directions import Direction
from zo.initial import initial_weights

KEY = (17, 4)
TARGETS = ("q_proj", "v_proj", "layers.1.mlp.up_proj", "down_proj")


def make_adapter(quantize="none", train="AB", num_views=4, targets=TARGETS):
    base = load_base(embedded.path(), threads=1, quantize=quantize)
    adapter = Adapter(base, key=(17, 4), targets=targets, rank=3, alpha=6, train=train)
    adapter.hold(num_views)
    return with_views(adapter)


def with_views(adapter):
    adapter.host[:] = np.random.default_rng(1).normal(scale=0.05, size=adapter.host.shape)
    adapter.push()
    return adapter


@pytest.fixture(scope="module")
def module_adapter():
    return make_adapter()


@pytest.fixture
def adapter(module_adapter):
    return with_views(module_adapter)


def make_batch(seed, width):
    rng = np.random.default_rng(seed)
    scored = rng.random((2, width)) < 0.4
    scored[:, 1] = True
    return Batch(rng.integers(2, 500, (2, width)), scored)


def one_by_one(adapter, batches):
    """The rows' losses, view i on batch i, as PEFT computes them."""
    losses = []
    for view, drawn in zip(adapter.host.copy(), batches, strict=True):
        before = adapter.host[0].copy()
        adapter.load(view)
        losses.append(row_losses(adapter.model, drawn))
        adapter.load(before)
    return np.concatenate([each.sums for each in losses])


# LLM.int8() treats columns apart in which any row of the pass is large: a row depends a little on those beside it.
@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 2e-6), ("nf4", 2e-6), ("int8", 2e-3)])
@pytest.mark.parametrize("train", ["B", "AB"])
def test_every_part_meets_its_own_view(quantize, tolerance, train):
    adapter = make_adapter(quantize, train)
    batches = [make_batch(0, 20), make_batch(0, 20), make_batch(1, 13), make_batch(1, 13)]
    with side_by_side(adapter, 4):
        together = row_losses(adapter.model, stacked(batches))
    apart = one_by_one(adapter, batches)
    assert len(set(apart.round(3))) == 8, "the views differ"
    assert together.sums == pytest.approx(apart, rel=tolerance)
    assert list(together.counts) == [count for each in batches for count in each.scored[:, 1:].sum(1)]


def test_text_is_generated_side_by_side(adapter):
    prompt = torch.from_numpy(np.random.default_rng(2).integers(2, 500, (2, 9)))

    def generated(prompts):
        return adapter.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=6,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )

    with side_by_side(adapter, 2):
        together = generated(prompt.repeat(2, 1))
    first = generated(prompt)
    adapter.views[0].copy_(adapter.views[1])
    second = generated(prompt)
    assert torch.equal(together, torch.cat([first, second]))
    assert not torch.equal(first, second)


def test_afterwards_the_model_is_as_before(adapter):
    drawn = make_batch(3, 10)
    before = row_losses(adapter.model, drawn).sums
    with contextlib.suppress(KeyboardInterrupt), side_by_side(adapter, 2):
        assert not np.array_equal(row_losses(adapter.model, drawn).sums, before)
        raise KeyboardInterrupt
    assert np.array_equal(row_losses(adapter.model, drawn).sums, before)


@pytest.mark.parametrize("num_views", [0, 5])
def test_no_more_views_than_the_adapter_holds(adapter, num_views):
    with (
        pytest.raises(ValueError, match=f"holds 4 views, asked for {num_views}"),
        side_by_side(adapter, num_views),
    ):
        pass


def test_batches_of_unequal_width_are_padded_with_what_is_not_scored():
    narrow, wide = make_batch(0, 3), make_batch(1, 5)
    both = stacked([narrow, wide])
    assert both.tokens.tolist() == [[*row, 0, 0] for row in narrow.tokens.tolist()] + wide.tokens.tolist()
    assert not both.scored[:2, 3:].any()
    assert np.array_equal(both.scored[2:], wide.scored)
    assert stacked([Batch(narrow.tokens)] * 2).scored is None


@pytest.mark.parametrize("kind", ["BertModel", "LlamaForCausalLM"])
def test_heads_side_by_side_are_those_one_by_one(kind, save_model, tmp_path):
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes, intermediate_size=64, max_position_embeddings=64))
    base = load_base(save_model(model, tmp_path / "base"), threads=1, labels=("a", "b", "c"))
    target = "layers.1.mlp.up_proj" if "Llama" in kind else "query"
    adapter = Adapter(base, key=(17, 4), targets=(target,), rank=3, alpha=6, train="B")
    adapter.hold(4)
    with_views(adapter)
    rng = np.random.default_rng(0)
    batches = []
    for width in (5, 9, 7, 9):
        lengths = np.array([width, width - 2])
        tokens = rng.integers(3, 1000, (2, width))
        tokens[1, width - 2 :] = base.padding
        batches.append(LabelledBatch(tokens, lengths, rng.integers(0, 3, 2), base.padding))
    expected = one_by_one(adapter, batches)
    with side_by_side(adapter, 4):
        found = row_losses(adapter.model, stacked(batches))
    assert np.allclose(found.sums, expected, rtol=1e-4)
    assert found.hits is not None
    assert np.ptp(expected) > 0.02
    after = one_by_one(adapter, batches[:1] * 4)
    assert np.array_equal(after[:2], expected[:2]), "PEFT's forward is back"


@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 2e-6), ("nf4", 2e-6)])
@pytest.mark.parametrize("num_copies", [2, 4])
def test_layers_below_the_first_adapted_one_see_every_batch_once(quantize, tolerance, num_copies):
    adapter = make_adapter(quantize, targets=("layers.2.mlp.up_proj", "layers.3.self_attn.q_proj"))
    batches = [make_batch(0, 20)] * num_copies + [make_batch(1, 13)] * (4 - num_copies)
    seen = []
    for layer in adapter.model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    with side_by_side(adapter, 4, num_copies):
        together = row_losses(adapter.model, stacked(batches))
    assert seen == [8 // num_copies] * 2 + [8] * 2
    assert together.sums == pytest.approx(one_by_one(adapter, batches), rel=tolerance)
    seen.clear()
    row_losses(adapter.model, make_batch(0, 5))
    assert seen == [2] * 4


def test_generated_copies_do_not_stay_equal_and_are_not_shared():
    adapter = make_adapter(targets=("layers.3.mlp.down_proj",))
    adapter.views.mul_(20)
    prompt = torch.from_numpy(np.random.default_rng(2).integers(2, 500, (2, 9)))
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def generated(prompts):
        return adapter.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)

    with side_by_side(adapter, 2, 2):
        together = generated(prompt.repeat(2, 1))
    first = generated(prompt)
    adapter.views[0].copy_(adapter.views[1])
    second = generated(prompt)
    assert torch.equal(together, torch.cat([first, second]))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("objective", ["exact-match", "token-f1"])
def test_a_model_that_calls_its_cache_otherwise_says_what_each_view_says(objective, save_model, tmp_path):
    """GPT-NeoX: its layers are given a `layer_past`. What is right for the one view is said by no other."""
    torch.manual_seed(3)
    config = transformers.GPTNeoXConfig(
        vocab_size=1024, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
    )
    base = load_base(save_model(transformers.GPTNeoXForCausalLM(config), tmp_path), threads=1)
    adapter = Adapter(base, key=KEY, targets=("layers.2.mlp.dense_h_to_4h",), rank=4, alpha=64, train="AB")
    weights = initial_weights(adapter.layout, KEY, "AB") + 2**24
    views = np.empty(adapter.size, np.float32), np.empty(adapter.size, np.float32)
    kernels.perturbed(weights, KEY, Direction(0, 1), 0.05, out=views)
    prompts = [prompt_ids(base.tokenizer, text) for text in ("def one", "Return the", "class A", "for x in")]
    adapter.load(views[1])
    said = [base.tokenizer.decode(each) for each in continuations(base.model, base, prompts, 6)]
    pairs = [Pair(base.tokenizer.decode(ids), text or "x") for ids, text in zip(prompts, said, strict=True)]
    ids = [
        (prompt, completion_ids(base.tokenizer, pair)) for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    judge = {"exact-match": exact_match, "token-f1": token_f1}[objective]
    probe = Probe(
        adapter,
        arrange(pairs, ids, 64),
        key=KEY,
        epsilon=0.05,
        directions=1,
        batch_size=4,
        seed=3,
        objective=Judged(base, 6, by_words(judge)),
    )
    losses = []
    for probe.at_once in (0, 1):
        losses.append(probe.losses(weights, [Direction(0, 1)], 2))
    assert np.array_equal(*losses)
    assert losses[0][0, 0] != losses[0][0, 1]


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("q_proj",), 0), (("layers.3.mlp.up_proj", "layers.1.mlp.up_proj"), 1), (("layers.3.mlp.up_proj",), 3)],
)
def test_which_layers_are_frozen(targets, count):
    adapter = make_adapter(targets=targets)
    layers, share = frozen_layers(adapter)
    assert layers == list(adapter.model.model.layers)[:count]
    assert share == count / 4


def test_an_encoder_whose_head_is_trained_alone_is_run_once_for_all_views(encoder):
    base = load_base(encoder, threads=1, labels=("0", "1"))
    adapter = Adapter(base, key=(17, 4), targets=(), rank=1, alpha=1, train="B")
    adapter.hold(4)
    with_views(adapter)
    layers, share = frozen_layers(adapter)
    assert (share, len(layers)) == (1.0, base.model.config.num_hidden_layers)
    seen = []
    layers[-1].register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    tokens = np.random.default_rng(0).integers(5, 50, (3, 9))
    batch = LabelledBatch(tokens, np.array([9, 4, 6]), np.array([0, 1, 1]), base.padding)
    with side_by_side(adapter, 4, 4):
        together = row_losses(adapter.model, stacked([batch] * 4))
    assert seen == [3]
    assert together.sums == pytest.approx(one_by_one(adapter, [batch] * 4), rel=1e-5)
    assert len(set(together.sums.round(4))) == 12
