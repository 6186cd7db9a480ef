"""Whose answers to public audits are far from the others'. Pure: answers in, findings with their reasons out.

In an audit all nodes take the same two losses: on the same public rows, at the same weights plus and minus the same
direction. Sound nodes agree within the noise of their arithmetic; who has a wrong base, wrong weights, broken memory or
made the answer up does not. The consensus is the median over the nodes, which a minority cannot move far; how far is
far depends on how far the nodes usually are from it.

One far answer proves nothing. A node is found by a sequential test (Wald 1945) that begins anew whenever it speaks for
the node (Page, "Continuous inspection schemes", Biometrika 41, 1954). An honest node that is far in at most one of a
hundred audits is accused no more often, on average, than once in `AUDITS_PER_FALSE_ALARM` of them (Lorden, Ann. Math.
Statist. 42, 1971); four far answers in a row are enough. Where half of the nodes or more are wrong in the same way, the
others are accused. And who lies about its own data while it answers audits honestly is not seen: nobody but the node
knows its loss.
"""

import hashlib
from collections import deque
from collections.abc import Mapping
from math import isfinite, log
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.influence import Finding
from zo.manifest import Manifest

AUDITS_PER_FALSE_ALARM: Final = 10**6
FAR_RATE: Final = 0.01
"""In how many audits an honest node's answer may be far from the consensus."""
_FAR_RATE_OF_THE_FAULTY: Final = 0.5
_ALARM: Final = log(AUDITS_PER_FALSE_ALARM)
_FAR: Final = log(_FAR_RATE_OF_THE_FAULTY / FAR_RATE)
_NEAR: Final = log((1 - _FAR_RATE_OF_THE_FAULTY) / (1 - FAR_RATE))
_FEWEST: Final = 3
"""Answers; of two that differ nobody knows which is wrong."""
_REMEMBERED: Final = 256
_WIDE: Final = 12.0
"""How many times the median distance from the consensus is far: 8 standard deviations of a Gaussian."""
_EXACT, _ROUNDED, _ANY = 1e-3, 2e-2, 1e-1
_OF_TYPICAL: Final = 0.75
_OF_TOLERANCE: Final = 0.1

Losses = tuple[float, float]
"""At the weights plus, and minus, the direction."""


def tolerance(manifest: Manifest) -> float:
    """The relative distance of losses that is never far: what machines differ by that compute as the manifest says.

    float32 on another processor differs by 1e-6; what 16 bits or a quantised base make of it, by some thousandths; a
    base in another quantisation, where nodes may choose, by some hundredths.
    """
    base = manifest.base
    if base.any_quantization:
        return _ANY
    return _EXACT if base.dtype == "float32" and base.quantize == "none" else _ROUNDED


def audit_sample(secret: bytes, agent: int, every: int, round: int) -> int | None:
    """The sample of the audit at a round: a uint32 that nobody can foresee without the secret; None if there is none.

    Args:
        secret: at most 64 bytes.
        agent: each has audits of its own.
        every: rounds between two, on average; 0 for none.
        round: of the weights that nodes are asked about.
    """
    if not every:
        return None
    name = agent.to_bytes(4, "little") + round.to_bytes(8, "little")
    drawn = hashlib.blake2b(name, key=secret, digest_size=16, person=b"zo-audit").digest()
    if int.from_bytes(drawn[:8], "little") * every >= 2**64:
        return None
    return int.from_bytes(drawn[8:12], "little")


class Consensus:
    """The audits of one track, since its coordinator started."""

    def __init__(self, tolerance: float) -> None:
        """Nothing asked yet.

        Args:
            tolerance: the relative distance of losses that is never far.
        """
        self._tolerance = tolerance
        self._levels: deque[float] = deque(maxlen=_REMEMBERED)
        self._gaps: deque[float] = deque(maxlen=_REMEMBERED)
        """Distances from the consensus, of the mean of the two losses and of their difference."""
        self._typical: deque[float] = deque(maxlen=_REMEMBERED)
        """Differences that were the consensus."""
        self._evidence: dict[int, float] = {}
        self._num: dict[int, tuple[int, int]] = {}
        """How many answers of a node were far, and how many it was asked for."""
        self._found: set[int] = set()

    def observe(self, losses_by_node: Mapping[int, Losses | None]) -> list[Finding]:
        """Take an audit in; who is found by it for the first time.

        Args:
            losses_by_node: of all that were asked and reported in that round; None for who reported and did not answer.
        """
        nodes = sorted(losses_by_node)
        answers = np.array([losses_by_node[node] or (np.nan, np.nan) for node in nodes]).reshape(-1, 2)
        finite = np.isfinite(answers).all(1)
        if finite.sum() < max(_FEWEST, len(nodes) // 2 + 1):
            return []  # nobody knows what would be right
        is_far = self._far(answers, finite)
        found = []
        for node, far in zip(nodes, is_far, strict=True):
            self._evidence[node] = max(0.0, self._evidence.get(node, 0.0) + (_FAR if far else _NEAR))
            num_far, num = self._num.get(node, (0, 0))
            self._num[node] = num_far, num = num_far + bool(far), num + 1
            if self._evidence[node] >= _ALARM and node not in self._found:
                self._found.add(node)
                reason = f"{num_far} of its {num} answers to public audits are far from the other nodes'"
                found.append(Finding(node, reason))
        return found

    def _far(self, answers: NDArray[np.float64], finite: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whose answers are far, (n,) bool; remembers how far they are."""
        with np.errstate(invalid="ignore", over="ignore"):
            level, gap = answers.mean(1), answers[:, 0] - answers[:, 1]
        usual_level, usual_gap = float(np.median(level[finite])), float(np.median(gap[finite]))
        from_level, from_gap = np.abs(level - usual_level), np.abs(gap - usual_gap)
        # A minority that answers nonsense must not widen what is remembered beyond what a median bears.
        self._levels.extend(from_level[finite])
        self._gaps.extend(from_gap[finite])
        self._typical.append(abs(usual_gap))
        near_level = max(self._tolerance * abs(usual_level), _WIDE * float(np.median(self._levels)))
        near_gap = max(
            _OF_TYPICAL * float(np.median(self._typical)),
            _OF_TOLERANCE * self._tolerance * abs(usual_level),
            _WIDE * float(np.median(self._gaps)),
        )
        assert isfinite(near_level)
        return np.asarray(~finite | (from_level > near_level) | (from_gap > near_gap), np.bool_)
