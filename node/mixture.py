"""Several agents' adapters on one base as one model: what they predict together.

Each agent says how likely every token or label is. Their mean is what is expected under a symmetric Dirichlet prior
over the agents' weights (Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.4: each has the expectation 1 / K).
A vote counts only what each holds the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from node.adapter import with_adapter
from node.tasks import Mix

_CASTING_VOTE = 1e-6
"""What decides between equal numbers of votes: less than any vote."""


Ask = Callable[[torch.nn.Module, int], torch.Tensor]
"""What is asked of one agent: (the model with its adapter active, its number) -> logits, (..., number of choices)."""


class Mixture(torch.nn.Module):
    """Several adapters in one model. They are asked one after the other, and the base is there once."""

    def __init__(self, model: torch.nn.Module, folders: Sequence[Path], mix: Mix) -> None:
        """Load all adapters into the model.

        Args:
            model: the base's, which is changed in place.
            folders: PEFT adapters, two or more; of equal votes, that of an earlier one counts.
            mix: mean of their probabilities, or vote of the likeliest.

        Raises:
            BaseError: one is missing, broken or another model's.
        """
        super().__init__()
        self._model: Any = with_adapter(model, folders[0], "0")
        for number, folder in enumerate(folders[1:], 1):
            with_adapter(self._model, folder, str(number))
        self._names = [str(number) for number in range(len(folders))]
        self._mix = mix

    def together(self, ask: Ask) -> torch.Tensor:
        """What all agents say together: logarithms of probabilities, or of shares of the votes; float32.

        What they are asked must be all there is to choose from: a choice among some words, say, is made before they are
        mixed, since the mean of conditional probabilities is not that of the others on a condition.
        """
        choices: list[torch.Tensor] = []
        total: torch.Tensor | None = None
        for number, name in enumerate(self._names):
            self._model.set_adapter(name)
            logits = ask(self._model, number)
            if self._mix == "vote":
                choices.append(logits.argmax(-1))
                num_choices = logits.shape[-1]
            else:
                each = logits.float().log_softmax(-1)
                total = each if total is None else torch.logaddexp(total, each)
        if total is None:
            return _counted(torch.stack(choices), num_choices).log()
        return total - math.log(len(self._names))


def asked_together(model: torch.nn.Module, ask: Ask) -> torch.Tensor:
    """What a model says, or the agents of a mixture together."""
    return model.together(ask) if isinstance(model, Mixture) else ask(model, 0)


def _counted(choices: torch.Tensor, num_choices: int) -> torch.Tensor:
    """The share of the votes of every choice: (..., num_choices) float32, from (num_agents, ...) int64.

    Of those with the most votes, the one that the earliest agent chose has a little more than the others.
    """
    num_agents = choices.shape[0]
    votes = (choices.unsqueeze(0) == choices.unsqueeze(1)).sum(
        1
    )  # (num_agents, ...): of what each of them chose
    order = torch.arange(num_agents).view(-1, *[1] * (choices.dim() - 1))
    casting = (votes * num_agents - order.to(votes.device)).argmax(0, keepdim=True)
    winner = choices.gather(0, casting)
    shares = torch.zeros(*choices.shape[1:], num_choices, device=choices.device)
    for chosen, share in ((choices, 1.0 / num_agents), (winner, _CASTING_VOTE)):
        index = chosen.movedim(0, -1)
        shares.scatter_add_(-1, index, torch.full(index.shape, share, device=choices.device))
    return shares
