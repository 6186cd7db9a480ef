"""What is trained by default, read off the names and shapes of a base's tensors."""

import pytest

from coordinator.trained import default_targets, head_of
from transport.base_files import BaseFilesError
from zo.layout import Head, targeted

LLAMA = {
    "model.embed_tokens": (1024, 32),
    "lm_head": (1024, 32),
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.mlp.up_proj": (64, 32),
    "model.layers.1.self_attn.q_proj": (32, 32),
    "model.layers.1.mlp.up_proj": (64, 32),
}
BERT = {
    "embeddings.word_embeddings": (1024, 32),
    "encoder.layer.0.attention.self.query": (32, 32),
    "encoder.layer.0.attention.output.dense": (32, 32),
    "encoder.layer.0.intermediate.dense": (64, 32),
    "encoder.layer.0.output.dense": (32, 64),
    "pooler.dense": (32, 32),
}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [(LLAMA, ["q_proj", "up_proj"]), (BERT, ["intermediate.dense", "output.dense", "query"])],
)
def test_all_of_the_layers_is_adapted_and_nothing_else(shapes, expected):
    assert default_targets(shapes) == expected
    assert targeted(shapes, expected) == sorted(name for name in shapes if ".0." in name or ".1." in name)


def test_a_base_without_layers_is_asked_about():
    with pytest.raises(BaseFilesError, match="no numbered layers; name modules with --target, among a, b"):
        default_targets({"b": (1, 1), "a": (2, 2)})


@pytest.mark.parametrize(
    ("configuration", "tensors", "expected"),
    [
        ({"hidden_size": 32, "architectures": ["BertModel"]}, {}, Head(3, 32, True)),
        ({"dim": 32, "architectures": ["DistilBertModel"]}, {}, Head(3, 32, True)),
        ({"hidden_size": 64, "architectures": ["LlamaForCausalLM"]}, {}, Head(3, 64, False)),
        ({"n_embd": 64, "architectures": ["GPT2LMHeadModel"]}, {}, Head(3, 64, False)),
        ({"hidden_size": 64}, {"score.weight": (2, 64)}, Head(3, 64, False)),
        ({"hidden_size": 64, "architectures": None}, {}, Head(3, 64, False)),
    ],
)
def test_the_head_follows_from_the_configuration(configuration, tensors, expected):
    assert head_of(configuration, tensors, 3) == expected


@pytest.mark.parametrize("configuration", [{}, {"hidden_size": "wide"}, {"hidden_size": 0}])
def test_a_base_of_unknown_width_gets_no_head(configuration):
    with pytest.raises(BaseFilesError, match=r"does not say how wide the base is \(one of hidden_size, "):
        head_of(configuration, {}, 2)
