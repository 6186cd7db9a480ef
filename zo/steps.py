"""The coordinator's rule: which step a round's codes are multiplied with, and which exponent the next round uses.

All of it is integer arithmetic on the codes alone, so that a restarted coordinator, an audit and a simulation derive
the same steps from the same ledger. Nodes never run it: they get the integers in the commit.
"""

from fractions import Fraction
from math import isqrt
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from zo.codes import CUT_OFF_BY_BITS, LIMIT, NO_VOTE
from zo.commit import STEP_MAX
from zo.manifest import Decay, Manifest, Moves, Schedule
from zo.packing import bits_of_commits
from zo.schedules import scheduled
from zo.weights import FRACTION_BITS

# Mean squares are kept in units of 2^-16, so that their roots come out in units of 2^-8.
_ONE: Final = 1 << 16
# The exponent aims at an RMS of 32 codes: 4 RMS then just saturate, and rounding adds 1/12 to a variance of 1,024.
# One step of the exponent is a factor of two, so any RMS within 32/sqrt(2) .. 32 sqrt(2) is as near as it gets.
_MEAN_SQUARE_LOW: Final = 512 * _ONE
_MEAN_SQUARE_HIGH: Final = 2048 * _ONE
# Two rounds that are measured at once may have any two exponents, and a ledger's integers have 64 bits.
_MEAN_SQUARE_MAX: Final = 1 << 62
# Below this RMS the codes are rounding noise, and normalising by it would only amplify that.
_RMS_FLOOR: Final = 1 << 8
EXPONENT_MIN: Final = -64
EXPONENT_MAX: Final = 63
_MAX_MOVE: Final = 8
# With more than a quarter of the codes cut off the RMS is a guess: look for it upwards, and remember nothing of it.
_CUT_OFF_SHARE: Final = 4
_CUT_OFF_MOVE: Final = 2
# A learning rate may be far smaller than the weights' resolution, since slopes may be large.
_RAW_BITS: Final = 60
# Of a code's unit: `coefficient = (code × step) >> 8`.
_CODE_BITS: Final = 8
# Of −m·z, where the first round's moves are some tenths of a unit in 10^4 weights; it adapts.
_MOVES_EXPONENT: Final = -4


class Scale(msgspec.Struct, frozen=True):
    """What the rule remembers between rounds."""

    mean_square: int
    """Smoothed mean square of the codes, in units of 2^-16 code²; 0 before the first vote and after a round whose
    codes were cut off."""
    exponent: int
    """Exponent of the codes of the round in progress."""
    moves_exponent: int = 0
    """Of its codes of moves; 0 in a run without them."""
    ahead: tuple[int, ...] = ()
    """Exponents of the codes of the round after, one per class, where nodes measure it already; else none."""


class StepRule(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest's schedule in integers."""

    rounds: int
    step: int
    """The step before warm-up and decay, in units of the weights' resolution (2^-28); of 2^-60 if it is raw."""
    decay: Decay
    smoothing: int
    first_exponent: int
    full_votes: int = 1
    warm_up: int = 0
    half_life: int = 0
    normalised: bool = True
    """Whether the step is divided by the RMS of the codes; else it is raw: it multiplies slopes as they are."""
    limit: int = LIMIT
    """Of a code that was cut off."""
    size: int = 0
    """Number of weights, where the run has moves; else 0."""
    moves_exponent_max: int = EXPONENT_MAX
    """Past which codes of moves say more than any move can be: who sends them does not push the step up for all."""
    pipeline: int = 0
    """Rounds that nodes measure ahead, as in the manifest."""

    def start(self) -> Scale:
        """The scale before round 0."""
        first = Scale(
            mean_square=0,
            exponent=self.first_exponent,
            moves_exponent=_MOVES_EXPONENT if self.size else 0,
        )
        return msgspec.structs.replace(first, ahead=self.exponents(first)) if self.pipeline else first

    def scheduled(self, round: int) -> int:
        """The step of a round by the schedule alone, in the units of `step`; 0 past the end of some decays."""
        return scheduled(
            self.step, self.decay, round, self.rounds, warm_up=self.warm_up, half_life=self.half_life
        )

    def advance(self, scale: Scale, round: int, codes: NDArray[np.int8]) -> tuple[int, Scale]:
        """The step for this round's codes, and the scale for the next round.

        step = step(round) × min(votes, full_votes) × 2^8 / (votes × RMS), so that `(code × step) >> 8` summed over
        the votes moves the weights by step(round) × min(votes, full_votes) × mean(code / RMS × z). RMS is the smoothed
        one, this round included. A raw step moves them by step(round) × min(votes, full_votes) × mean(slope × z),
        where slope = code × 2^exponent: step = step(round) × min(votes, full_votes) × 2^(8 + exponent) / votes.

        The best step grows with the number of directions as long as what they add up to is mostly noise, which is up
        to (|g|² + noise) tr H / gᵀHg of them; docs/recipes.md has figures.

        The exponent that suits these codes is that of the next round or, where nodes measure that one already, of the
        round after it.

        Args:
            scale: what the last round left.
            round: 0 ≤ round.
            codes: (n,) int8, all codes of the round.
        """
        votes = codes[codes != NO_VOTE].astype(np.int64)
        if votes.size == 0:
            return 0, _passed(scale, self.exponents(scale)[0], scale.mean_square)
        mean_square = int(votes @ votes) * _ONE // votes.size
        if scale.mean_square:
            smoothed = scale.mean_square + ((mean_square - scale.mean_square) >> self.smoothing)
        else:
            smoothed = mean_square
        is_cut_off = int(np.count_nonzero(np.abs(votes) == self.limit)) * _CUT_OFF_SHARE > votes.size
        if is_cut_off:
            # The true RMS is out of sight. What is remembered would say that these codes are larger than usual,
            # and normalising by it would make the step too large as long as the search goes on.
            smoothed = mean_square
        schedule = self.scheduled(round) * min(votes.size, self.full_votes)
        if self.normalised:
            rms = max(isqrt(smoothed), _RMS_FLOOR)
            step = min((schedule << 16) // (votes.size * rms), STEP_MAX)
        else:
            shift = FRACTION_BITS - _RAW_BITS + _CODE_BITS + scale.exponent
            step = min((schedule << max(shift, 0)) // (votes.size << max(-shift, 0)), STEP_MAX)

        suited = _suited(scale.exponent, smoothed, is_cut_off, scale.ahead[:1])
        return step, _passed(scale, suited, 0 if is_cut_off else smoothed)

    def exponents(self, scale: Scale) -> tuple[int, ...]:
        """The last that were said, of the codes of each class, as a commit has them."""
        if scale.ahead:
            return scale.ahead
        return (scale.exponent, scale.moves_exponent) if self.size else (scale.exponent,)

    def of_round(
        self, scale: Scale, round: int, slopes: NDArray[np.int8], moves: NDArray[np.int8]
    ) -> tuple[tuple[int, ...], Scale]:
        """The step of each class of codes of a round, and the scale for the next round.

        Moves have no schedule and no RMS: n codes −m·z along random z are summed up to an estimate of the mean move,
        and what is best of it is a share 1 / (n + size) of Σ (m·z) z for each of them. So step = 2^(exponent + 36) /
        (n + size), in integers: 2^28 weights to a unit, and 2^8 for the shift of `codes.coefficients`.

        Args:
            scale: what the last round left.
            round: 0 ≤ round.
            slopes: (n,) int8, all codes of slopes.
            moves: (m,) int8, all codes of moves; none in a run without them.
        """
        step, after = self.advance(scale, round, slopes)
        if not self.size:
            return (step,), after
        shift = FRACTION_BITS + _CODE_BITS + scale.moves_exponent
        of_moves = min((1 << max(shift, 0)) // ((moves.size + self.size) << max(-shift, 0)), STEP_MAX)
        votes = moves[moves != NO_VOTE].astype(np.int64)
        if votes.size:
            mean_square = int(votes @ votes) * _ONE // votes.size
            is_cut_off = int(np.count_nonzero(np.abs(votes) == self.limit)) * _CUT_OFF_SHARE > votes.size
            suited = _suited(scale.moves_exponent, mean_square, is_cut_off, scale.ahead[1:])
            suited = min(suited, self.moves_exponent_max)
        else:
            of_moves, suited = 0, self.exponents(scale)[1]
        if not scale.ahead:
            return (step, of_moves), msgspec.structs.replace(after, moves_exponent=suited)
        ahead = after.ahead[0], suited
        return (step, of_moves), msgspec.structs.replace(after, moves_exponent=scale.ahead[1], ahead=ahead)


def _suited(exponent: int, mean_square: int, is_cut_off: bool, said: tuple[int, ...]) -> int:
    """The exponent in which codes of this exponent and mean square would be as large as they should.

    Args:
        exponent: of the codes.
        mean_square: of the codes, in units of 2^-16 code².
        is_cut_off: whether so many were cut off that it is a guess.
        said: the exponent of the codes of the round after, if it is known: where that one is larger there is nothing to
            be gained by looking below it.
    """
    move = _exponent_move(mean_square)
    if is_cut_off:
        return min(max((exponent + max(move, _CUT_OFF_MOVE), *said)), EXPONENT_MAX)
    return min(max(exponent + move, EXPONENT_MIN), EXPONENT_MAX)


def _passed(scale: Scale, suited: int, mean_square: int) -> Scale:
    """The scale for the next round, the exponent of moves aside.

    Args:
        scale: of this round.
        suited: the exponent that would suit this round's codes.
        mean_square: to remember, in units of this round's codes.
    """
    exponent = scale.ahead[0] if scale.ahead else suited
    moved = exponent - scale.exponent
    rescaled = mean_square >> (2 * moved) if moved >= 0 else mean_square << (-2 * moved)
    ahead = (suited, *scale.ahead[1:]) if scale.ahead else ()
    return Scale(min(rescaled, _MEAN_SQUARE_MAX), exponent, scale.moves_exponent, ahead)


def _exponent_move(mean_square: int) -> int:
    """By how much the exponent must change for the RMS to come within a factor sqrt(2) of 32."""
    move = 0
    while mean_square > _MEAN_SQUARE_HIGH and move < _MAX_MOVE:
        mean_square >>= 2
        move += 1
    while mean_square < _MEAN_SQUARE_LOW and move > -_MAX_MOVE:
        mean_square <<= 2
        move -= 1
    return move


def _moves_exponent_max(moves: Moves, size: int) -> int:
    """The exponent that suits the longest move there can be, or the next one.

    A step of AdamW moves no weight by more than about its rate (Kingma and Ba 2014, arXiv 1412.6980, section 2.1), so
    that a move of n steps has a length, which is the RMS of its projections, of at most n × rate × sqrt(size). Steps of
    SGD have no such bound.
    """
    if not moves.projections or moves.optimizer != "adamw":
        return EXPONENT_MAX
    longest_square = (moves.updates * Fraction(moves.rate)) ** 2 * size
    return next(
        (each for each in range(EXPONENT_MIN, EXPONENT_MAX) if 32**2 * Fraction(4) ** each >= longest_square),
        EXPONENT_MAX,
    )


def step_bits(schedule: Schedule) -> int:
    """Bits after the point of a manifest's step, which is rounded to them."""
    return FRACTION_BITS if schedule.normalised else _RAW_BITS


def step_rule(manifest: Manifest) -> StepRule:
    """The rule of a run."""
    schedule = manifest.schedule
    return StepRule(
        rounds=manifest.run.rounds,
        step=round(schedule.step * 2 ** step_bits(schedule)),
        decay=schedule.decay,
        smoothing=schedule.smoothing,
        first_exponent=schedule.first_exponent,
        full_votes=schedule.full_votes,
        warm_up=schedule.warm_up,
        half_life=schedule.half_life,
        normalised=schedule.normalised,
        limit=CUT_OFF_BY_BITS[bits_of_commits(manifest)],
        size=manifest.adapter.size if manifest.moves.projections else 0,
        moves_exponent_max=_moves_exponent_max(manifest.moves, manifest.adapter.size),
        pipeline=manifest.run.pipeline,
    )
