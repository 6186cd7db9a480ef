"""Codes: how a projected gradient becomes one byte, and how a byte becomes an integer coefficient.

Which exponent and step a round uses is decided by the coordinator (`steps`).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from zo.weights import INT32_MAX

NO_VOTE: Final = -128
"""The code of a gradient that is NaN, infinite or was not measured. It moves nothing."""
LIMIT: Final = 127
"""Largest magnitude of a code."""
COEFFICIENT_SHIFT: Final = 8


def encode(gradients: NDArray[np.float64], exponent: int, rng: np.random.Generator) -> NDArray[np.int8]:
    """One code per projected gradient: clip(round_stochastic(g / 2^exponent), −127, 127), (n,) int8.

    Stochastic rounding goes up with a probability equal to the fraction, so that within ±127 the expected
    code is g / 2^exponent (Gupta et al. 2015, arXiv 1502.02551, section 3). One draw per gradient, voting or
    not.

    Args:
        gradients: (n,) float64; an entry that is not finite becomes NO_VOTE.
        exponent: shared by the swarm, from the last commit.
        rng: the node's own; codes need not be reproducible by others.
    """
    draws = rng.random(gradients.shape)
    votes = np.isfinite(gradients)
    # A finite gradient may overflow in the division; it is clipped like any large one.
    with np.errstate(over="ignore"):
        scaled = np.clip(np.ldexp(np.where(votes, gradients, 0.0), -exponent), -LIMIT, LIMIT)
    floor = np.floor(scaled)
    return np.where(votes, floor + (draws < scaled - floor), NO_VOTE).astype(np.int8)


def decode(codes: NDArray[np.int8], exponent: int) -> NDArray[np.float64]:
    """The gradients that codes stand for: code × 2^exponent, NaN for NO_VOTE, (n,) float64."""
    return np.ldexp(np.where(codes == NO_VOTE, np.nan, codes), exponent)


def coefficients(codes: NDArray[np.int8], step: int) -> NDArray[np.int32]:
    """What each code moves the weights by: (code × step) >> 8, (n,) int32; NO_VOTE moves by 0.

    The product is int64 and the shift arithmetic: −1 >> 8 is −1, on every machine.

    Raises:
        ValueError: the step is no int32.
    """
    if not -INT32_MAX - 1 <= step <= INT32_MAX:
        raise ValueError(f"step must be an int32, got {step}")
    product = codes.astype(np.int64) * np.int64(step)
    return np.where(codes == NO_VOTE, 0, product >> COEFFICIENT_SHIFT).astype(np.int32)
