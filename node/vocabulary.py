"""The tokens of the embedded base model: how they are learnt from text, and text as one row of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

VOCABULARY = 1024
"""Tokens, the 256 bytes and the two marks included."""
CONTEXT = 256
"""The longest sequence, in tokens."""
BEGIN, END = "<s>", "</s>"


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A transformers tokenizer: byte-level BPE, VOCABULARY tokens, "<s>" before every text.

    Every byte is a token, so that no text is unknown to it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0), (END, 1)]
            ),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def stream(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All texts in one row of tokens, each ended by "</s>": (num_tokens,) int64.

    Every second text keeps the "<s>" before it: a prompt begins with one, text that a node packs does not,
    and the model shall know both.
    """
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    tokens = [token for i, row in enumerate(rows) for token in (*row[i % 2 :], tokenizer.eos_token_id)]
    return torch.tensor(tokens, dtype=torch.int64)
