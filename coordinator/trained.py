"""What a run trains unless it is told otherwise, from the base's files alone: modules with an adapter, and a head."""

from collections.abc import Mapping
from typing import Any, Final

from transport.base_files import BaseFilesError, is_causal, is_in_layer, layers_only
from zo.layout import Head

_WIDTHS: Final = ("hidden_size", "d_model", "dim", "n_embd")
"""What models call the number of features of a token."""


def default_targets(shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """The linear modules of all numbered layers: last parts of their names, as many as it takes to mean no others.

    Args:
        shapes: (out_features, in_features) by module name, of everything in the base's files.

    Raises:
        BaseFilesError: the base has no numbered layers.
    """
    inside = layers_only(shapes)
    if not inside:
        raise BaseFilesError(
            f"this base has no numbered layers; name modules with --target, among {', '.join(sorted(shapes))}"
        )
    outside = {_end(name, 1) for name in shapes if not is_in_layer(name)}
    targets = {_end(name, 2 if _end(name, 1) in outside else 1) for name in inside}
    return sorted(targets)


def head_of(
    configuration: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], num_labels: int
) -> Head:
    """The head that transformers gives to this base for classification, read off its files.

    Args:
        configuration: of the base.
        tensors: shape by name of all its tensors.
        num_labels: how many logits it has.

    Raises:
        BaseFilesError: the configuration does not say how wide the base is.
    """
    width = next((configuration[name] for name in _WIDTHS if name in configuration), None)
    if type(width) is not int or width < 1:
        raise BaseFilesError(
            f"config.json does not say how wide the base is (one of {', '.join(_WIDTHS)}); a head needs that"
        )
    # On causal models transformers puts a layer without a bias, named "score"; on encoders one with a bias.
    scored = is_causal(configuration) or ("score.weight" in tensors and "score.bias" not in tensors)
    return Head(num_labels, width, has_bias=not scored)


def _end(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])
