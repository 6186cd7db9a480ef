"""The cap on one node's share of a round. Pure: the codes that nodes reported in, those that are committed out.

A code is at most ±127, which bounds what a node can do. But the exponent follows the RMS of all codes, those of an
attacker included: four of sixteen nodes that always send ±127 push it up until the others' codes are small. So no
node's codes may be longer, in the Euclidean norm, than `max_share` times those of the median participant. Longer ones
are scaled down, in integers, before anything is computed from them: a ledger proves itself without the cap being known.
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from zo.codes import NO_VOTE


def capped(
    codes: NDArray[np.int8], max_share: float, unit: int = 1
) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """The codes of a round with every node's cut to its largest share, and whose were cut.

    The limit is `max_share`, in units of 2^-8, times the upper median of the norms that are not 0: with two nodes the
    larger, which is therefore never cut, and with more one that a minority cannot raise. Codes that are too long are
    multiplied by limit / norm and rounded towards 0, to a code of their width; no vote
    stays no vote.

    Args:
        codes: (nodes, directions) int8, as reported.
        max_share: at least 1.
        unit: distance of the codes of a width (`zo.codes.UNIT_BY_BITS`).

    Returns:
        (nodes, directions) int8, and (nodes,) bool.
    """
    magnitudes = np.where(codes == NO_VOTE, 0, np.abs(codes, dtype=np.int16)).astype(np.int64)
    squares = (magnitudes * magnitudes).sum(1)
    heard = np.sort(squares[squares > 0])
    if heard.size < 3:
        return codes, np.zeros(len(codes), np.bool_)
    share = round(max_share * 256)
    limit = int(heard[heard.size // 2]) * share * share
    is_cut = np.array([int(square) << 16 > limit for square in squares], np.bool_)
    if not is_cut.any():
        return codes, is_cut
    found = codes.copy()
    for row in np.flatnonzero(is_cut):
        factor = isqrt((limit << 16) // int(squares[row]))  # in units of 2^-16
        smaller = np.sign(codes[row]) * (((magnitudes[row] * factor) >> 16) // unit * unit)
        found[row] = np.where(codes[row] == NO_VOTE, NO_VOTE, smaller)
    return found, is_cut
