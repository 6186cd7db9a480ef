"""Local steps: how a node follows its own codes between two commits, on a copy of the weights that it then drops.

With local steps a node measures some of a round's directions, moves its copy by their codes, measures the next where it
then is, and so on. What it reports are all the codes; the commit replays everyone's from the common weights (as the
local steps of FedKSeed, arXiv 2312.06353, section 4). Nothing here becomes state.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from zo import kernels
from zo.codes import NO_VOTE, coefficients
from zo.commit import STEP_MAX, Commit
from zo.directions import Direction, RunKey, stack
from zo.steps import Scale, StepRule
from zo.weights import Bound

_USUAL: Final = np.array([32], np.int8)
"""One code as large as the exponent aims at."""


def first_step(rule: StepRule, round: int, exponent: int) -> int:
    """What a vote is multiplied with on a walk where no commit tells: the step of a usual one that is alone.

    Args:
        rule: of the run.
        round: of the walk.
        exponent: of its codes.

    Returns:
        In the units of `Commit.steps`.
    """
    step, _ = rule.advance(Scale(mean_square=0, exponent=exponent), round, _USUAL)
    return step


def next_step(rule: StepRule, commit: Commit, codes: NDArray[np.int8], moved: int) -> int:
    """What one vote is multiplied with on a walk after a commit: the whole step that it gave to a vote.

    With as many `full_votes` as one node has directions, the commits then move the weights by the mean of the walks.

    Args:
        rule: of the run.
        commit: the last one.
        codes: its codes.
        moved: by how much its exponent differs from that of its own codes: their unit is 2^moved as large from then on.
    """
    votes = int(np.count_nonzero(codes != NO_VOTE))
    step = commit.steps[0] * votes // max(min(votes, rule.full_votes), 1)
    if not step:
        return first_step(rule, commit.round + 1 + rule.pipeline, commit.exponents[0])
    return min(step << moved if moved >= 0 else step >> -moved, STEP_MAX)


def walk(
    measure: Callable[[NDArray[np.int32], Sequence[Direction]], NDArray[np.int8]],
    weights: NDArray[np.int32],
    key: RunKey,
    names: Sequence[Direction],
    local_steps: int,
    step: int,
) -> NDArray[np.int8]:
    """The codes of a round's directions, (n,) int8, measured in so many local steps.

    Args:
        measure: the codes, (m,), of m directions at some weights.
        weights: (size,) int32, where it begins; left as they are.
        key: of the run.
        names: of n directions, a multiple of the number of steps.
        local_steps: at least 1; every step measures n / local_steps directions. With 1 nothing moves.
        step: what a code is multiplied with, as in `zo.codes.coefficients`.

    Raises:
        WeightsOverflow: a weight of the copy would leave its range.
    """
    each = len(names) // local_steps
    assert each * local_steps == len(names)
    if local_steps == 1:
        return measure(weights, names)
    local = weights.copy()
    bound = Bound(local)
    found = []
    for start in range(0, len(names), each):
        part = names[start : start + each]
        codes = measure(local, part)
        found.append(codes)
        if start + each < len(names):
            amounts = coefficients(codes, step)
            bound.admit(local, amounts)
            kernels.apply(local, key, stack(part), amounts)
    return np.concatenate(found)
