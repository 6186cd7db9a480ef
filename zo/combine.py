"""Combining: what the reports of nodes that share their directions come to, as one row of codes.

All of it is integer arithmetic. A mean of n codes is said in units of its standard error: √n times the mean. As long as
codes are mostly noise it is then as large as each of them, however many nodes there are, so the rule for exponents
(`steps`), which sees commits alone, brings both near 32. Where they agree it is larger; the exponent grows, and each
code needs the less resolution the more of them are averaged.
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from zo.codes import LIMIT, NO_VOTE, UNIT_BY_BITS
from zo.manifest import Combination, Manifest
from zo.naming import naming

_LAST: int = 2**15 - 1


def combine(codes: NDArray[np.int8], how: Combination, trim: int = 0) -> NDArray[np.int8]:
    """One code for each direction from those of several nodes, (d,) int8; NO_VOTE where nobody votes.

    - mean: of the votes; trimmed: without the `trim` percent that are lowest and as many that are highest, rounded down
      to whole votes (Yin et al. 2018, arXiv 1803.01498); median: of the votes, the mean of the two in the middle where
      their number is even. Each times √votes, rounded half away from 0 and cut off at ±127.
    - majority: ±32, the sign of most votes (FeedSign, arXiv 2501.17610). A vote of 0 has no sign; an even split is
      NO_VOTE, and moves nothing.

    Args:
        codes: (n, d) int8, a row for each node.
        how: as above.
        trim: percent, less than 50.
    """
    votes = codes != NO_VOTE
    if how == "majority":
        balance = np.where(votes, np.sign(codes), 0).sum(axis=0, dtype=np.int64)
        return np.where(balance == 0, NO_VOTE, np.sign(balance) * UNIT_BY_BITS[1]).astype(np.int8)
    num = votes.sum(axis=0)
    if how == "median":
        low, high = (num - 1) // 2, num // 2 + 1
    else:
        low = num * (trim if how == "trimmed" else 0) // 100
        high = num - low
    ordered = np.sort(np.where(votes, codes.astype(np.int16), _LAST), axis=0)
    place = np.arange(len(codes))[:, np.newaxis]
    sums = np.where((place >= low) & (place < high), ordered, 0).sum(axis=0, dtype=np.int64)
    rows = zip(sums.tolist(), (high - low).tolist(), num.tolist(), strict=True)
    return np.array([_in_standard_errors(*row) for row in rows], np.int8)


def combined(
    nodes: Sequence[int], codes: NDArray[np.int8], manifest: Manifest
) -> tuple[tuple[int, ...], NDArray[np.int8]]:
    """What a commit says of the codes of a round: its participants, ascending, and their codes in that order.

    Args:
        nodes: who reported, ascending.
        codes: (nodes × directions,) theirs, in that order.
        manifest: of the run.
    """
    policy = manifest.directions
    if not policy.are_combined or not nodes:
        return tuple(nodes), codes
    rows = codes.reshape(len(nodes), -1)
    voice_of = naming(manifest).voice
    voices = np.array([voice_of(node) for node in nodes])
    heard = np.unique(voices)
    row_by_voice = [combine(rows[voices == voice], policy.combine, policy.trim) for voice in heard]
    return tuple(heard.tolist()), np.concatenate(row_by_voice)


def _in_standard_errors(total: int, kept: int, num: int) -> int:
    """total / kept × √num, rounded half away from 0 and cut off; NO_VOTE for none."""
    if num == 0:
        return NO_VOTE
    size = (isqrt(4 * total * total * num // (kept * kept)) + 1) // 2
    return min(size, LIMIT) * (1 if total > 0 else -1)
