"""The step rule: exact integers, normalised steps, and an exponent that finds its place."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo.codes import CUT_OFF_BY_BITS, NO_VOTE, coefficients, encode
from zo.commit import STEP_MAX
from zo.manifest import Moves
from zo.steps import Scale, StepRule, step_rule

RULE = StepRule(rounds=100, step=2**28 // 50, decay="linear", smoothing=3, first_exponent=-4)


def codes(*values: int) -> np.ndarray:
    return np.array(values, np.int8)


def test_a_small_scenario_to_the_last_bit():
    # Changing this changes what every ledger must say: audits of older runs would fail.
    scale = RULE.start()
    seen = []
    for number, round_codes in enumerate(
        [
            codes(3, -4, 5, -6),
            codes(12, -20, 33, -8),
            codes(NO_VOTE, -20, 33, NO_VOTE),
            codes(NO_VOTE, NO_VOTE),
            codes(127, -127, 127, 5),
            codes(0, 0, 0, 0),
            codes(1, 0, 0, 0),
        ]
    ):
        step, scale = RULE.advance(scale, number, round_codes)
        seen.append((step, scale.mean_square, scale.exponent))
    assert seen == [
        (74103562, 90177536, -7),
        (9594678, 82380800, -7),
        (19498234, 78182144, -7),
        (0, 78182144, -7),
        (2998348, 0, -5),
        (326417472, 0, -13),
        (322981504, 67108864, -19),
    ]


def test_the_rule_of_a_manifest(make_manifest):
    manifest = make_manifest(rounds=7, step=0.02, decay="constant", smoothing=2, first_exponent=-9)
    assert step_rule(manifest) == StepRule(
        rounds=7, step=round(0.02 * 2**28), decay="constant", smoothing=2, first_exponent=-9
    )
    assert step_rule(make_manifest()).decay == "linear"
    raw = step_rule(make_manifest(decay="halving", half_life=5, warm_up=2, normalised=False, step=2.0**-20))
    assert (raw.decay, raw.half_life, raw.warm_up, raw.normalised) == ("halving", 5, 2, False)
    assert raw.step == 2**40


RAW = msgspec.structs.replace(RULE, normalised=False, decay="constant", step=2**40)


@pytest.mark.parametrize("exponent", [-30, -8, 0, 9])
def test_a_raw_step_is_a_learning_rate_for_slopes_as_they_are(exponent):
    round_codes = codes(30, -60, 90, 0)
    step, _ = RAW.advance(Scale(0, exponent), 3, round_codes)
    learning_rate = 2.0**40 / 2**60
    wanted = learning_rate * 2.0**28 * round_codes.astype(np.float64) * 2.0**exponent / 4
    got = coefficients(round_codes, step).astype(np.float64)
    assert np.all(np.abs(got - wanted) <= 2 + np.abs(wanted) / 200)


def test_a_raw_step_depends_on_no_code_and_finds_its_exponent_as_others_do():
    small, large = codes(3, -4, 5), codes(30, -40, 50)
    assert RAW.advance(RAW.start(), 0, small)[0] == RAW.advance(RAW.start(), 0, large)[0]
    for round_codes in (small, large, codes(127, 127), codes(0, 1)):
        assert RAW.advance(RAW.start(), 0, round_codes)[1] == RULE.advance(RULE.start(), 0, round_codes)[1]


def test_votes_share_a_raw_step_beyond_full_votes():
    rule = msgspec.structs.replace(RAW, full_votes=8)
    one, four, sixteen = (rule.advance(rule.start(), 0, codes(*[9] * n))[0] for n in (1, 4, 16))
    assert one == four == 2 * sixteen


@pytest.mark.parametrize("exponent", [-64, 63])
def test_a_raw_step_never_leaves_its_range(exponent):
    for step in (0, 1, 2**62):
        rule = msgspec.structs.replace(RAW, step=step)
        found, _ = rule.advance(Scale(0, exponent), 0, codes(5))
        assert 0 <= found <= STEP_MAX
    assert found == (0 if exponent == -64 else STEP_MAX) or exponent == -64


votes = st.lists(st.integers(-126, 126), min_size=1, max_size=300).filter(any)


@given(votes, st.integers(0, 99))
def test_a_round_moves_by_step_times_the_mean_of_code_over_rms(values, number):
    step, _ = RULE.advance(RULE.start(), number, codes(*values))
    array = np.array(values, np.float64)
    wanted = RULE.step * (1 - number / 100) * array / (len(values) * np.sqrt(np.mean(array**2)))
    got = coefficients(codes(*values), step).astype(np.float64)
    # off by less than: the shift's 1, the step's fraction times code / 2^8, and 1 in 256 of the RMS
    assert np.all(np.abs(got - wanted) <= 2 + np.abs(wanted) / 200)


@pytest.mark.parametrize(("num_votes", "share"), [(1, 1), (7, 7), (8, 8), (9, 8), (300, 8)])
def test_up_to_full_votes_each_vote_adds_a_whole_step(num_votes, share):
    round_codes = codes(*([32, -32] * num_votes)[:num_votes])
    shared, scale = RULE.advance(RULE.start(), 3, round_codes)
    step, same = msgspec.structs.replace(RULE, full_votes=8).advance(RULE.start(), 3, round_codes)
    assert step == pytest.approx(share * shared, abs=share)
    assert same == scale


def test_a_missing_vote_is_no_vote_of_the_full(make_manifest):
    rule = step_rule(make_manifest(full_votes=4))
    assert rule.full_votes == 4
    three, _ = rule.advance(rule.start(), 0, codes(32, NO_VOTE, -32, 32))
    four, _ = rule.advance(rule.start(), 0, codes(32, 32, -32, 32))
    assert three == four


@given(votes, st.integers(1, 20))
def test_a_vote_that_is_missing_moves_nothing_and_counts_for_nothing(values, num_missing):
    with_missing = np.concatenate([codes(*values), np.full(num_missing, NO_VOTE, np.int8)])
    assert RULE.advance(RULE.start(), 3, with_missing) == RULE.advance(RULE.start(), 3, codes(*values))


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=50), st.randoms(use_true_random=False))
def test_the_order_of_codes_does_not_matter(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    assert RULE.advance(RULE.start(), 0, codes(*values)) == RULE.advance(RULE.start(), 0, codes(*shuffled))


def test_without_votes_nothing_changes():
    scale = Scale(mean_square=12345, exponent=-7)
    for none in (codes(), codes(NO_VOTE, NO_VOTE)):
        assert RULE.advance(scale, 5, none) == (0, scale)


def test_the_step_decays_to_nothing_or_not_at_all():
    scale, round_codes = RULE.start(), codes(30, -30)
    steps = [RULE.advance(scale, number, round_codes)[0] for number in (0, 50, 99, 100, 1000)]
    assert steps[1] == pytest.approx(steps[0] / 2, rel=1e-6)
    assert steps[2] == pytest.approx(steps[0] / 100, rel=1e-4)
    assert steps[3:] == [0, 0]
    constant = StepRule(rounds=100, step=RULE.step, decay="constant", smoothing=3, first_exponent=-4)
    assert {constant.advance(scale, number, round_codes)[0] for number in (0, 50, 99)} == {steps[0]}


def test_the_step_never_leaves_int32():
    rule = StepRule(rounds=1, step=4 * 2**28, decay="constant", smoothing=0, first_exponent=0)
    step, _ = rule.advance(rule.start(), 0, codes(1))
    assert step == STEP_MAX
    assert coefficients(codes(127, -127), step).dtype == np.int32


@pytest.mark.parametrize("smoothing", [0, 3, 6])
@pytest.mark.parametrize("start", [-64, -20, -4, 0, 13, 63])
@pytest.mark.parametrize("slope", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_exponent_brings_the_rms_near_32_from_any_start(start, slope, smoothing, bits):
    limit = CUT_OFF_BY_BITS[bits]
    rule = StepRule(
        rounds=1000, step=RULE.step, decay="constant", smoothing=smoothing, first_exponent=start, limit=limit
    )
    rng = np.random.default_rng(7)
    scale = rule.start()
    rms = []
    # where it starts among codes of mere rounding noise, the memory of 2^smoothing rounds has to fade first
    for number in range(160 + 8 * 2**smoothing):
        round_codes = encode(slope * rng.standard_normal(64), scale.exponent, rng, bits)
        rms.append(float(np.sqrt(np.mean(round_codes.astype(np.float64) ** 2))))
        _, scale = rule.advance(scale, number, round_codes)
    assert 32 / 2 < np.median(rms[-40:]) < 32 * 2
    assert min(rms[-40:]) > 32 / 3
    assert max(rms[-40:]) < 32 * 3


@pytest.mark.parametrize("smoothing", [0, 3, 16])
def test_codes_that_are_cut_off_raise_the_exponent_and_never_the_step(smoothing):
    # With an exponent far too small every code is ±127, round after round, until the exponent is found. What the
    # rule remembers must not make these steps larger than the manifest's.
    rule = StepRule(rounds=1000, step=RULE.step, decay="constant", smoothing=smoothing, first_exponent=-64)
    scale = rule.start()
    round_codes = codes(127, -127, 127, 127)
    for number in range(40):
        before = scale.exponent
        step, scale = rule.advance(scale, number, round_codes)
        assert scale.exponent == before + 2
        moved = np.abs(coefficients(round_codes, step).astype(np.int64)).sum()
        assert moved == pytest.approx(rule.step, rel=1e-3)


def test_signs_are_never_cut_off_and_leave_the_exponent_alone(make_manifest):
    rule = step_rule(make_manifest(bits=1))
    scale = rule.start()
    for number in range(5):
        step, scale = rule.advance(scale, number, codes(32, -32, 32, NO_VOTE))
        assert scale == Scale(mean_square=1024 << 16, exponent=rule.first_exponent)
        assert 3 * (32 * step >> 8) == pytest.approx(rule.scheduled(number), rel=1e-3)


def test_the_exponent_stays_within_its_bounds():
    high = StepRule(rounds=10, step=1, decay="constant", smoothing=0, first_exponent=63)
    assert high.advance(high.start(), 0, codes(127, 127))[1].exponent == 63
    assert high.advance(high.start(), 0, codes(100, 100))[1].exponent == 63
    low = StepRule(rounds=10, step=1, decay="constant", smoothing=0, first_exponent=-64)
    assert low.advance(low.start(), 0, codes(0, 1))[1].exponent == -64


def test_few_codes_cut_off_do_not_count():
    _, scale = RULE.advance(RULE.start(), 0, codes(127, *[20] * 15))
    assert scale.exponent == -4
    assert scale.mean_square > 0


MOVING = msgspec.structs.replace(RULE, size=10_000)
NOBODY = np.empty(0, np.int8)


def test_moves_have_the_step_of_the_best_shrinkage():
    """A code of c is c × 2^e of −m·z: the weights are to go by (m·z) z / (n + size), in units of 2^-28."""
    moves = np.array([20, -40, 30, -31] * 64, np.int8)
    scale = msgspec.structs.replace(MOVING.start(), moves_exponent=-3)
    (_, step), after = MOVING.of_round(scale, 0, codes(3), moves)
    assert step == 2 ** (28 + 8 - 3) // (256 + 10_000)
    assert coefficients(np.array([40], np.int8), step)[0] == pytest.approx(
        40 * 2**-3 * 2**28 / (256 + 10_000), rel=1e-5
    )
    assert after.moves_exponent == -3  # an RMS of about 32
    assert after.exponent == RULE.advance(RULE.start(), 0, codes(3))[1].exponent


@pytest.mark.parametrize(("code", "moved"), [(32, 0), (2, -4), (1, -5), (100, 2), (127, 2), (NO_VOTE, 0)])
def test_the_exponent_of_moves_follows_their_size_alone(code, moved):
    (_, step), after = MOVING.of_round(MOVING.start(), 0, codes(3), np.full(64, code, np.int8))
    assert after.moves_exponent == MOVING.start().moves_exponent + moved
    assert (step == 0) == (code == NO_VOTE)


def test_a_round_without_movers_and_one_without_slopes_leave_the_other_class_alone():
    (step, of_moves), after = MOVING.of_round(MOVING.start(), 0, codes(3), NOBODY)
    assert step > 0 == of_moves
    assert after.moves_exponent == MOVING.start().moves_exponent
    (step, of_moves), after = MOVING.of_round(MOVING.start(), 0, NOBODY, codes(3))
    assert step == 0 < of_moves
    assert after.exponent == RULE.first_exponent


@pytest.mark.parametrize(
    ("updates", "rate", "optimizer", "size", "most"),
    [(2, 0.0625, "adamw", 10_000, -1), (2, 0.0625, "adamw", 65_536, 0), (2, 0.0625, "sgd", 10_000, 63)],
)
def test_codes_of_moves_push_their_exponent_no_further_than_a_move_can_go(
    make_manifest, updates, rate, optimizer, size, most
):
    """An eighth of the root of 10,000 is 12.5, at most 32 / 2; of that of 65,536 it is 32."""
    manifest = make_manifest(size=size)
    moves = Moves(projections=64, updates=updates, rate=rate, optimizer=optimizer)
    rule = step_rule(msgspec.structs.replace(manifest, moves=moves))
    assert rule.moves_exponent_max == most
    scale, hostile = rule.start(), np.full(64, 127, np.int8)
    for number in range(50):
        (_, step), scale = rule.of_round(scale, number, NOBODY, hostile)
        assert step <= min((1 << (most + 36)) // (64 + size), STEP_MAX)
    assert scale.moves_exponent == most


def test_a_run_without_moves_has_one_class():
    steps, after = RULE.of_round(RULE.start(), 0, codes(3), NOBODY)
    assert (steps, after) == (
        (RULE.advance(RULE.start(), 0, codes(3))[0],),
        RULE.advance(RULE.start(), 0, codes(3))[1],
    )
    assert len(RULE.exponents(after)) == 1
    assert MOVING.exponents(MOVING.start()) == (RULE.first_exponent, -4)


@pytest.mark.parametrize(("exponent", "step"), [(63, 2**31 - 1), (-64, 0), (-40, 0)])
def test_the_step_of_moves_stays_in_its_range(exponent, step):
    scale = msgspec.structs.replace(MOVING.start(), moves_exponent=exponent)
    assert MOVING.of_round(scale, 0, codes(3), codes(3))[0][1] == step


# ---- pipelined rounds -----------------------------------------------------------------------------------------------

AHEAD = msgspec.structs.replace(RULE, pipeline=1, decay="constant")


def slopes_in(exponent, size, seed):
    rng = np.random.default_rng(seed)
    return encode(size * rng.standard_normal(256), exponent, rng)


def test_what_a_commit_says_is_for_the_round_after_the_next():
    scale = AHEAD.start()
    assert (scale.exponent, AHEAD.exponents(scale)) == (-4, (-4,))
    said = []
    for number in range(6):
        due = [-4, -4, *said][number]
        assert scale.exponent == due
        _, scale = AHEAD.advance(scale, number, slopes_in(due, 2.0, number))
        said += AHEAD.exponents(scale)
    assert said == [-4] * 6


@pytest.mark.parametrize("size", [2.0**-20, 2.0**-3, 2.0**9, 2.0**30])
def test_the_exponents_of_both_rounds_on_the_way_find_the_size_of_slopes_and_stay(size):
    scale = AHEAD.start()
    seen = []
    for number in range(90):
        seen.append(scale.exponent)
        _, scale = AHEAD.advance(scale, number, slopes_in(scale.exponent, size, number))
    assert len(set(seen[70:])) == 1
    assert 32 / 2**0.51 <= size / 2.0 ** seen[-1] <= 32 * 2**0.51


def test_steps_are_those_of_a_run_that_is_not_pipelined_while_the_exponent_stays():
    ahead, plain = AHEAD.start(), RULE.start()
    for number in range(20):
        round_codes = slopes_in(-4, 2.0, number)
        pipelined, ahead = AHEAD.advance(ahead, number, round_codes)
        step, plain = msgspec.structs.replace(RULE, decay="constant").advance(plain, number, round_codes)
        assert (pipelined, ahead.mean_square) == (step, plain.mean_square)


def test_what_is_remembered_is_in_units_of_the_round_in_progress():
    """Codes of an RMS of 8 in units of 2^-4 have one of 2 in units of 2^-2."""
    scale = Scale(0, -4, 0, (-2,))
    _, after = AHEAD.advance(scale, 0, codes(8, -8, 8, -8))
    assert after == Scale(4 << 16, -2, 0, (-6,))
    # slopes of the same size in the next round confirm it
    _, again = AHEAD.advance(after, 1, codes(2, -2, 2, -2))
    assert again == Scale(1024 << 16, -6, 0, (-6,))


def test_a_search_upwards_does_not_stay_behind_the_round_on_the_way():
    _, after = AHEAD.advance(Scale(0, -10, 0, (-1,)), 0, codes(127, 127, -127))
    assert after == Scale(0, -1, 0, (-1,))
    _, after = AHEAD.advance(Scale(0, -10, 0, (-10,)), 0, codes(127, 127, -127))
    assert after == Scale(0, -10, 0, (-8,))


def test_a_round_without_a_vote_says_again_what_was_said_last():
    step, after = AHEAD.advance(Scale(1024 << 16, -4, 0, (-5,)), 3, codes(NO_VOTE))
    assert (step, after) == (0, Scale(4096 << 16, -5, 0, (-5,)))


@pytest.mark.parametrize(("exponent", "ahead"), [(63, -64), (-64, 63)])
def test_what_is_remembered_fits_a_ledger_whatever_the_exponents(exponent, ahead):
    _, after = AHEAD.advance(Scale(1 << 30, exponent, 0, (ahead,)), 0, codes(120, -120))
    assert 0 <= after.mean_square < 2**63
    step, _ = AHEAD.advance(after, 1, codes(1, -1))
    assert 0 <= step < 2**31


def test_moves_are_said_ahead_as_well():
    rule = msgspec.structs.replace(MOVING, pipeline=1)
    scale = rule.start()
    assert rule.exponents(scale) == (RULE.first_exponent, -4)
    _, one = rule.of_round(scale, 0, codes(32, -32), codes(2, 2))
    assert (one.moves_exponent, one.ahead) == (-4, (-4, -8))
    _, two = rule.of_round(one, 1, codes(32, -32), NOBODY)
    assert (two.moves_exponent, two.ahead) == (-8, (-4, -8))
