"""The text beside the embedded base model: what it is, how it was made, how good it is."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers

from node import corpus


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean cross-entropies per token, in nats."""

    training: float
    """The mean over the last hundredth of the updates, each before it was made and with dropout."""
    validation: float
    """On docstrings of files that were not trained on."""
    topics: float
    """On the topics, the text that fine-tuning is for."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a reader must know to judge the model or to make it again."""

    command: str
    """The command line that makes it."""
    digest: str
    """Of the base, as a run's manifest names it."""
    num_parameters: int
    vocabulary: int
    """Tokens that the tokenizer has."""
    window: int
    """Tokens of the windows that the losses were measured on."""
    texts: Sequence[str]
    """The docstrings, those for validation included."""
    training: str
    """Sizes and schedule, in words."""
    losses: Losses

    def render(self) -> str:
        """The card in Markdown."""
        characters = sum(map(len, self.texts))
        return f"""# The embedded base model

A Llama-architecture language model of {self.num_parameters:,} parameters with a byte-level BPE tokenizer of
{self.vocabulary:,} tokens. It has read the docstrings of Python's standard library and nothing else, and is
the base that `zo-node demo` and the tests fine-tune. The shapes of its linear layers are multiples of 64, as
4-bit kernels want.

## How it was made
From scratch, on a CPU, with

    {self.command}

| | |
|---|---|
| text | docstrings of modules, classes and functions in the library of Python {platform.python_version()} |
| its size | {len(self.texts):,} docstrings, {characters:,} characters; one file in twenty validates |
| read as | running text: every run of white space is one space (the tokenizer knows the text as it is) |
| its digest (`node.corpus.digest`) | `{corpus.digest(self.texts)}` |
| left out | tests, `lib2to3`, installed packages; `pydoc_data` and `pdb`, whose text the topics have |
| training | {self.training} |
| libraries | torch {torch.__version__.partition("+")[0]}, transformers {transformers.__version__} |
| digest of the base (`node.embedded.DIGEST`) | `{self.digest}` |

Another processor rounds otherwise: there the same command gives an equally good model, but not the same bits.

## How good it is
Cross-entropy per token in nats, in windows of {self.window} tokens. Guessing evenly costs
{math.log(self.vocabulary):.2f}.

| text | loss |
|---|---|
| training, last updates, with dropout | {self.losses.training:.3f} |
| docstrings of files not trained on | {self.losses.validation:.3f} |
| `pydoc_data.topics`, never seen: what the demo fine-tunes on | {self.losses.topics:.3f} |

It is good for a demo and for tests: it loads at once, needs no download, and has room to improve on the
topics. Most of that room is on purpose: it has never seen the lines and the indentation of a page, and
fine-tuning on the topics, which have both, teaches it these first. It writes text that looks like a docstring
and means nothing. It is no assistant, and says nothing about larger models.

## Licence
The weights and the tokenizer are ours, under Apache-2.0. They were trained on the documentation strings in
Python's source, copyright the Python Software Foundation, under the PSF licence. That text is not part of
this package.
"""
