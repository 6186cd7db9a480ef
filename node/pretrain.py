"""Makes the embedded base model: a byte-level tokenizer and a small Llama that read Python's docstrings.

``python -m node.pretrain --out DIRECTORY`` writes what ``node/embedded`` holds, from text that the running
Python carries. Which text that is, is `node.corpus`'s decision; the sizes and the schedule are decided here.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from node import base, corpus
from node.model_card import Losses, ModelCard
from node.vocabulary import CONTEXT, VOCABULARY, stream, train_tokenizer

HIDDEN = 128
EVALUATION_WINDOW = 128
"""Tokens, as in the demo's runs."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the weights, beside the text and the machine's arithmetic."""

    steps: int = 2500
    """Updates of the weights."""
    batch_size: int = 8
    """Windows of one update."""
    sequence_length: int = 256
    """Tokens of one window, at most the context of the model."""
    learning_rate: float = 4e-3
    """The highest, reached after the warm-up; a cosine takes it to zero."""
    warmup: int = 200
    """Updates in which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    dropout: float = 0.1
    """Of what the embedding and every layer add to the residual stream, while training."""
    seed: int = 0
    """Decides the initial weights, the order of the windows and what is dropped."""

    def __str__(self) -> str:
        """One line for the model card."""
        return (
            f"{self.steps:,} updates, {self.batch_size} × {self.sequence_length} tokens each; AdamW, "
            f"learning rate at most {self.learning_rate:g}, weight decay {self.weight_decay:g}, "
            f"dropout {self.dropout:g}, seed {self.seed}"
        )

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not 2 <= self.sequence_length <= CONTEXT:
            raise ValueError(f"sequence_length must be between 2 and {CONTEXT}, got {self.sequence_length}")


def split_docstrings(docstrings: Sequence[corpus.Docstring]) -> tuple[list[str], list[str]]:
    """(training, validation) texts: one file in twenty validates, picked by a hash of its name.

    Whole files, because the docstrings of one file repeat each other's sentences.
    """
    texts: tuple[list[str], list[str]] = ([], [])
    for module, text in docstrings:
        picked = hashlib.blake2b(module.encode(), digest_size=1).digest()[0] % 20 == 0
        texts[picked].append(text)
    return texts


def as_running_text(text: str) -> str:
    """The text with every run of white space as one space.

    The model reads no other, so the layout of a page, its lines and indentation, is left to learn: few
    directions have most of it, which suits a demo that measures a few thousand.
    """
    return " ".join(text.split())


def new_model(seed: int) -> Any:
    """An untrained LlamaForCausalLM of 918,656 parameters, its weights drawn from the seed.

    Every linear layer has shapes that are multiples of 64: 4-bit kernels need it.
    """
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.04,
        dtype=torch.float32,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def windows(tokens: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Batches (batch_size, sequence_length) without end: all windows, then again at a new offset, reordered.

    Raises:
        ValueError: fewer tokens than one batch needs.
    """
    length, batch_size = settings.sequence_length, settings.batch_size
    if len(tokens) < length * (batch_size + 1):  # one window more, for the offset
        raise ValueError(
            f"a batch of {batch_size} windows of {length} tokens needs {length * (batch_size + 1)} tokens, "
            f"got {len(tokens)}; give more text or make the batch smaller"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        rows = tokens[offset : offset + (len(tokens) - offset) // length * length].view(-1, length)
        order = torch.randperm(len(rows), generator=generator)
        for first in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[order[first : first + batch_size]]


def learning_rate(step: int, settings: Settings) -> float:
    """Rises linearly over the warm-up, then falls as half a cosine to zero."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def train(
    model: Any,
    tokens: Tensor,
    settings: Settings,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Trains the model in place with AdamW (Loshchilov and Hutter 2019); the mean of its last losses.

    The text is read over ten times, so residuals are dropped at random (Vaswani et al. 2017, section 5.4).

    What is dropped comes from torch's global generator: the same weights come only from a model that
    `new_model` made just before.

    Args:
        model: a causal language model of transformers.
        tokens: (num_tokens,) int64.
        settings: sizes and schedule.
        report: called after every update with its number, from 1, and the loss before it.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    batches = windows(tokens, settings)
    losses: list[float] = []
    hooks = _drop_residuals(model, settings.dropout)
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        report(step + 1, losses[-1])
    model.eval()
    for hook in hooks:
        hook.remove()
    last = losses[-max(1, settings.steps // 100) :]
    return sum(last) / len(last)


def _drop_residuals(model: Any, dropout: float) -> list[RemovableHandle]:
    """Hooks, because transformers' Llama has dropout in its attention only."""

    def drop(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        return torch.nn.functional.dropout(output, dropout, training=module.training)

    writers = ("embed_tokens", "o_proj", "down_proj")
    return [
        module.register_forward_hook(drop) for name, module in model.named_modules() if name.endswith(writers)
    ]


@torch.no_grad()
def evaluate(model: Any, tokens: Tensor) -> float:
    """The mean cross-entropy per token, in nats, over windows of EVALUATION_WINDOW tokens.

    A shorter rest at the end is left out.

    Raises:
        ValueError: fewer tokens than one window.
    """
    rows = tokens[: len(tokens) // EVALUATION_WINDOW * EVALUATION_WINDOW].view(-1, EVALUATION_WINDOW)
    if not len(rows):
        raise ValueError(f"an evaluation needs at least {EVALUATION_WINDOW} tokens, got {len(tokens)}")
    total = 0.0
    for batch in torch.split(rows, 16):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(rows)


def pretrain(out: Path, settings: Settings, command: str, console: Console) -> Losses:
    """Trains on this Python's docstrings, writes the whole package directory and says what came out of it."""
    docstrings = corpus.stdlib_docstrings()
    training, validation = split_docstrings(docstrings)
    tokenizer = train_tokenizer(training)
    tokens = stream(tokenizer, list(map(as_running_text, training)))
    model = new_model(settings.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{len(docstrings):,} docstrings, {len(tokens):,} tokens to train on; {size:,} parameters")

    begin = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=settings.steps)
        final = train(
            model,
            tokens,
            settings,
            lambda step, loss: progress.update(task, completed=step, description=f"loss {loss:.3f}"),
        )
    topics = list(corpus.distinct_topics(corpus.pydoc_topics()).values())
    losses = Losses(
        training=final,
        validation=evaluate(model, stream(tokenizer, list(map(as_running_text, validation)))),
        topics=evaluate(model, stream(tokenizer, topics)),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    digest = base.read_digest(out)
    card = ModelCard(
        command=command,
        digest=digest,
        num_parameters=size,
        vocabulary=VOCABULARY,
        window=EVALUATION_WINDOW,
        texts=[text for _, text in docstrings],
        training=str(settings),
        losses=losses,
    )
    (out / "README.md").write_text(card.render(), encoding="utf-8")
    console.print(
        f"{time.monotonic() - begin:.0f} s; loss: training {losses.training:.3f}, docstrings held out "
        f"{losses.validation:.3f}, topics {losses.topics:.3f}\ndigest {digest}, for node/embedded/__init__.py"
    )
    return losses


DEFAULTS = Settings()
app = typer.Typer(add_completion=False)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Directory to write; made if missing.")],
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = DEFAULTS.steps,
    batch_size: Annotated[int, typer.Option(help="Windows of one update.")] = DEFAULTS.batch_size,
    sequence_length: Annotated[int, typer.Option(help="Tokens of one window.")] = DEFAULTS.sequence_length,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = DEFAULTS.learning_rate,
    seed: Annotated[int, typer.Option(help="Decides initial weights and order.")] = DEFAULTS.seed,
    threads: Annotated[int, typer.Option(help="Processor threads.", min=1)] = 1,
) -> None:
    """Make the embedded base model again.

    Example: python -m node.pretrain --out node/embedded --steps 2500
    """
    torch.set_num_threads(threads)
    try:
        settings = Settings(
            steps=steps,
            batch_size=batch_size,
            sequence_length=sequence_length,
            learning_rate=learning_rate,
            seed=seed,
        )
        command = (
            f"python -m node.pretrain --out node/embedded --steps {steps} --batch-size {batch_size}"
            f" --sequence-length {sequence_length} --learning-rate {learning_rate:g} --seed {seed}"
            f" --threads {threads}"
        )
        pretrain(out, settings, command, Console())
    except ValueError as error:
        typer.secho(f"pretrain: error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
