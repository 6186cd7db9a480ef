"""Codes: how a projected gradient becomes one byte or less, and how a code becomes an integer coefficient.

Codes of every width are int8 in common units: narrower ones only have fewer values. How they are packed is `packing`;
which exponent and step a round uses is decided by the coordinator (`steps`).
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
UNIT_BY_BITS: Final = {8: 1, 4: 12, 1: 32}
"""Distance of a width's codes. For Gaussian slopes whose codes have an RMS of 32, give or take a factor of sqrt(2), 12
is best in 4 bits: rounding and clipping cost 3% of the steps. One bit is the sign, and costs 57%."""
LEVELS_BY_BITS: Final = {8: LIMIT, 4: 7, 1: 1}
"""Largest magnitude of a width's codes, in its unit."""
CUT_OFF_BY_BITS: Final = {8: LIMIT, 4: 7 * 12, 1: 255}
"""Magnitude of a code that says of its slope only that it is at least so large; out of reach where codes are signs."""


def encode(
    gradients: NDArray[np.float64], exponent: int, rng: np.random.Generator, bits: int = 8
) -> NDArray[np.int8]:
    """One code per projected gradient: clip(round_stochastic(g / 2^exponent), −127, 127), (n,) int8.

    Stochastic rounding goes up with a probability equal to the fraction, so that within ±127 the expected
    code is g / 2^exponent (Gupta et al. 2015, arXiv 1502.02551, section 3). One draw per gradient, voting or
    not. Of 4 bits it is 12 × clip(round_stochastic(g / 2^exponent / 12), −7, 7); of one bit ±32 by the sign alone,
    which is worth more than a rounding that is right in expectation, and by the draw where g is 0.

    Args:
        gradients: (n,) float64; an entry that is not finite becomes NO_VOTE.
        exponent: shared by the swarm, from the last commit.
        rng: the node's own; codes need not be reproducible by others.
        bits: 8, 4 or 1.
    """
    unit, levels = UNIT_BY_BITS[bits], LEVELS_BY_BITS[bits]
    draws = rng.random(gradients.shape)
    votes = np.isfinite(gradients)
    # A finite gradient may overflow in the division; it is clipped like any large one.
    with np.errstate(over="ignore"):
        scaled = np.ldexp(np.where(votes, gradients, 0.0), -exponent)
    if bits == 1:
        rounded = np.where(scaled == 0, np.where(draws < 0.5, 1, -1), np.sign(scaled))
    else:
        scaled = np.clip(scaled / unit, -levels, levels)
        floor = np.floor(scaled)
        rounded = floor + (draws < scaled - floor)
    return np.where(votes, unit * rounded, NO_VOTE).astype(np.int8)


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
