"""How the step changes over the rounds: integers in, an integer out, the same on every machine.

Nothing here knows what the step is multiplied with: that is `steps`.
"""

from typing import Final

from zo.manifest import Decay

_FRACTION_BITS: Final = 96
_ONE: Final = 1 << _FRACTION_BITS
_PI: Final = 0x3_243F6A88_85A308D3_13198A2E
"""π × 2^96, rounded down."""


def scheduled(
    step: int, decay: Decay, round: int, rounds: int, *, warm_up: int = 0, half_life: int = 0
) -> int:
    """The step of a round, floored.

    With r rounds of warm-up left out, t = round − warm_up and n = rounds − warm_up:

        warming up   step × (round + 1) / (warm_up + 1)
        constant     step
        linear       step × (n − t) / n
        cosine       step × (1 + cos(π t / n)) / 2        (Loshchilov and Hutter 2016, arXiv 1608.03983)
        halving      step × 2^−⌊t / half_life⌋

    Args:
        step: before warm-up and decay, ≥ 0, in any unit.
        decay: which of these.
        round: 0 ≤ round; past the end `linear` and `cosine` are 0.
        rounds: of the run, more than `warm_up`.
        warm_up: rounds in which the step grows to its full size.
        half_life: rounds after which it halves.
    """
    if round < warm_up:
        return step * (round + 1) // (warm_up + 1)
    t, n = round - warm_up, rounds - warm_up
    match decay:
        case "constant":
            return step
        case "linear":
            return step * max(n - t, 0) // n
        case "cosine":
            return (step * _raised_cosine(min(t, n), n)) >> _FRACTION_BITS
        case "halving":
            return step >> (t // half_life)


def _raised_cosine(t: int, n: int) -> int:
    """(1 + cos(π t / n)) / 2 for 0 ≤ t ≤ n, in units of 2^−96, within 2^−90 of it.

    The Taylor series in integers, since a library's cosine may differ in its last bit between machines. Two rounds of
    a run of 10^8 differ by 2^−52 at least, so it falls in every round.
    """
    if 2 * t > n:
        return _ONE - _raised_cosine(n - t, n)
    angle = _PI * t // n
    square = (angle * angle) >> _FRACTION_BITS
    cosine = term = _ONE
    factor = 1
    while term:
        term = ((term * square) >> _FRACTION_BITS) // (factor * (factor + 1))
        cosine += -term if factor % 4 == 1 else term
        factor += 2
    return (_ONE + cosine) >> 1
