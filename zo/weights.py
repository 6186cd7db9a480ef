"""The integer weights: what their bits mean, how they are digested, and that they never wrap.

How they move is `kernels.apply`; by how much is `codes.coefficients`.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS: Final = 28
"""value = weights × 2^−28: range ±8, resolution 3.7e−9."""
INT32_MAX: Final = 2**31 - 1
DIGEST_BYTES: Final = 16
_DIGEST_PERSON: Final = b"zo-weights"


class WeightsOverflow(ArithmeticError):  # noqa: N818 — it names what would happen, as ZeroDivision… does
    """An update could move a weight out of int32, which is ±8 in value."""


def zeros(size: int) -> NDArray[np.int32]:
    """`size` weights of value 0."""
    return np.zeros(size, np.int32)


def to_float(weights: NDArray[np.int32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The values of the weights, float32 of the same shape, in `out` if it is given; rounded once, to 24 significant
    bits."""
    # One pass without a copy of the weights in between: numpy converts them piece by piece.
    found: NDArray[np.float32] = np.multiply(
        weights, np.float32(2.0**-FRACTION_BITS), out=out, dtype=np.float32, casting="unsafe"
    )
    return found


def from_float(values: NDArray[np.floating]) -> NDArray[np.int32]:
    """The weights nearest to these values, int32 of the same shape; ties to even.

    Raises:
        ValueError: a value is not finite or not within ±8; the message names its index in the flattened
            array.
    """
    with np.errstate(over="ignore"):  # infinity is refused below, with its index
        scaled = np.rint(np.asarray(values, np.float64) * 2.0**FRACTION_BITS)
    outside = ~(np.abs(scaled) <= INT32_MAX)  # also true for NaN
    if outside.any():
        index = int(np.argmax(outside))
        value = float(np.asarray(values).reshape(-1)[index])
        raise ValueError(f"weights must be finite and within ±8, got {value} at index {index}")
    return scaled.astype(np.int32)


def digest(
    round: int, weights: NDArray[np.int32], agent: int = 0, state: Sequence[NDArray[np.int32]] = ()
) -> bytes:
    """(16,) bytes for the round, the agent and every bit of the weights: two replicas are equal if these are.

    BLAKE2b-128, personalised "zo-weights", over round (uint64), agent (uint32) and the int32, all
    little-endian; then over the vectors of `state`, on which the weights to come depend as well.

    Raises:
        ValueError: the weights are not int32.
    """
    sponge = hashlib.blake2b(digest_size=DIGEST_BYTES, person=_DIGEST_PERSON)
    sponge.update(round.to_bytes(8, "little") + agent.to_bytes(4, "little"))
    for vector in (weights, *state):
        if vector.dtype != np.int32:
            raise ValueError(f"weights must be int32, got {vector.dtype}")
        sponge.update(np.ascontiguousarray(vector, "<i4").data)
    return sponge.digest()


class Bound:
    """A running upper bound on max |weight|: stops a run with a clear error before a weight wraps.

    It grows by Σ|coefficient| per update, which needs no look at the weights; only when that passes int32 is
    the true maximum taken anew. Check before the update, grow after it:

        bound.check(weights, coefficients)
        kernels.apply(weights, key, directions, coefficients)
        bound.grow(coefficients)

    Attributes:
        value: the bound, in weight units (2^−28).
    """

    def __init__(self, weights: NDArray[np.int32], anchor: NDArray[np.int32] | None = None) -> None:
        """Look at the weights.

        Args:
            weights: as they are now.
            anchor: what they may be drawn towards, if anything: no entry gets beyond the larger of both.
        """
        self._least = 0 if anchor is None else _largest(anchor)
        self.value = max(_largest(weights), self._least)

    def check(self, weights: NDArray[np.int32], coefficients: NDArray[np.int32]) -> None:
        """Check that an update with these coefficients cannot wrap any of these weights.

        Raises:
            WeightsOverflow: it might.
        """
        growth = _sum_of_magnitudes(coefficients)
        if self.value + growth > INT32_MAX:
            self.value = max(_largest(weights), self._least)
        if self.value + growth > INT32_MAX:
            raise WeightsOverflow(
                f"a weight of magnitude {self.value * 2.0**-FRACTION_BITS:.3f} could move by "
                f"{growth * 2.0**-FRACTION_BITS:.3f} and leave ±8; the step is too large or the run diverges"
            )

    def grow(self, coefficients: NDArray[np.int32]) -> None:
        """Take note of an update that `check` let pass."""
        self.value += _sum_of_magnitudes(coefficients)

    def admit(self, weights: NDArray[np.int32], coefficients: NDArray[np.int32]) -> None:
        """`check`, then `grow`: for a caller that applies the update right away and cannot fail in between.

        Raises:
            WeightsOverflow: as `check`; the bound still holds then.
        """
        self.check(weights, coefficients)
        self.grow(coefficients)


def _largest(weights: NDArray[np.int32]) -> int:
    """max |weight|, 0 for no weights; −2^31 has no int32 magnitude, hence two passes and Python integers."""
    return max(int(weights.max()), -int(weights.min())) if weights.size else 0


def _sum_of_magnitudes(coefficients: NDArray[np.int32]) -> int:
    return int(np.abs(coefficients.astype(np.int64)).sum())
