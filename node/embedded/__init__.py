"""The base model of the demo and the tests: a small language model of ours, beside this file.

``README.md`` in this directory is its model card. ``python -m node.pretrain`` makes it again.
"""

from pathlib import Path

DIGEST = "02772075bfaee22afbcfa6297541f080"
"""Hex BLAKE2b-128 of config.json and model.safetensors (``zo.layout.base_digest``)."""


def path() -> Path:
    """The directory that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load."""
    return Path(__file__).parent
