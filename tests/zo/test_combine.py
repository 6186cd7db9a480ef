"""Codes of nodes that share directions: what they come to, in integers, whoever reports first."""

from fractions import Fraction
from math import floor, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo.codes import NO_VOTE
from zo.combine import combine, combined
from zo.directions import GROUP_0, SHARED

code = st.integers(-128, 127)
tables = st.integers(1, 6).flatmap(
    lambda d: st.lists(st.lists(code, min_size=d, max_size=d), min_size=1, max_size=9)
)
HOW = [("mean", 0), ("median", 0), ("trimmed", 25), ("trimmed", 49), ("majority", 0)]


def plainly_combined(column: list[int], how: str, trim: int) -> int:
    """As the words of the module say, in fractions."""
    votes = sorted(each for each in column if each != NO_VOTE)
    if not votes:
        return NO_VOTE
    if how == "majority":
        up, down = sum(each > 0 for each in votes), sum(each < 0 for each in votes)
        return NO_VOTE if up == down else 32 if up > down else -32
    if how == "median":
        middle = len(votes) // 2
        votes_kept = votes[middle : middle + 1] if len(votes) % 2 else votes[middle - 1 : middle + 1]
    else:
        cut = len(votes) * trim // 100
        votes_kept = votes[cut : len(votes) - cut]
    mean = Fraction(sum(votes_kept), len(votes_kept))
    # The largest whole number k with k − 1/2 <= |mean| √n, without a root: its square decides.
    square = mean * mean * len(votes)
    size = floor(sqrt(square)) + 2
    while size and Fraction(2 * size - 1, 2) ** 2 > square:
        size -= 1
    return min(size, 127) * (1 if mean > 0 else -1)


@given(tables, st.sampled_from(HOW))
def test_combining_is_as_the_plain_form_says(table, how):
    rows = np.array(table, np.int8)
    found = combine(rows, *how)
    assert found.dtype == np.int8
    assert found.tolist() == [plainly_combined(list(column), *how) for column in rows.T.tolist()]


@given(tables, st.sampled_from(HOW), st.randoms())
def test_the_order_of_nodes_does_not_matter(table, how, rng):
    shuffled = list(table)
    rng.shuffle(shuffled)
    assert np.array_equal(combine(np.array(table, np.int8), *how), combine(np.array(shuffled, np.int8), *how))


@given(tables, st.sampled_from(HOW))
def test_opposite_codes_give_the_opposite(table, how):
    rows = np.array(table, np.int8)
    opposite = np.where(rows == NO_VOTE, rows, -rows).astype(np.int8)
    found = combine(rows, *how)
    assert np.array_equal(combine(opposite, *how), np.where(found == NO_VOTE, found, -found))


@pytest.mark.parametrize(
    ("column", "how", "expected"),
    [
        ([5], ("mean", 0), 5),
        ([10, 10, 10, 10], ("mean", 0), 20),  # in standard errors: agreement counts
        ([40, -40, NO_VOTE], ("mean", 0), 0),
        ([1, 0], ("mean", 0), 1),  # 0.71
        ([1, 0, 0, 0], ("mean", 0), 1),  # a half, away from 0
        ([-1, 0, 0, 0], ("mean", 0), -1),
        ([127] * 9, ("mean", 0), 127),
        ([3, 100, 4], ("median", 0), 7),  # 4 √3
        ([3, 100, 4, NO_VOTE], ("median", 0), 7),
        ([-127, 8, 8, 127], ("trimmed", 25), 16),
        ([-127, 8, 127], ("trimmed", 25), 5),  # a quarter of three is no whole vote: 8 / 3 √3
        ([9, -1, -1], ("majority", 0), -32),
        ([9, -9], ("majority", 0), NO_VOTE),  # an even split moves nothing
        ([9, 0, NO_VOTE], ("majority", 0), 32),
        ([0, 0], ("majority", 0), NO_VOTE),
        ([NO_VOTE, NO_VOTE], ("mean", 0), NO_VOTE),
        ([NO_VOTE, NO_VOTE], ("median", 0), NO_VOTE),
        ([NO_VOTE], ("trimmed", 49), NO_VOTE),
        ([NO_VOTE], ("majority", 0), NO_VOTE),
    ],
)
def test_cases_that_are_easily_wrong(column, how, expected):
    assert combine(np.array(column, np.int8)[:, np.newaxis], *how).tolist() == [expected]


@pytest.mark.parametrize("num", [1, 4, 16, 64])
@pytest.mark.parametrize("how", [("mean", 0), ("median", 0), ("trimmed", 25)])
def test_codes_that_are_noise_stay_as_large_however_many_nodes_there_are(num, how):
    """Else the exponent, which sees combined codes alone, would fall until the reports are cut off."""
    rows = np.rint(32 * np.random.default_rng(0).standard_normal((num, 4000))).clip(-127, 127).astype(np.int8)
    rms = float(np.sqrt(np.mean(combine(rows, *how).astype(float) ** 2)))
    assert 30 < rms < 42  # a median's standard error is √(π/2) of a mean's


@pytest.mark.attack
@pytest.mark.parametrize("how", [("median", 0), ("trimmed", 30), ("majority", 0)])
@pytest.mark.parametrize("attack", ["inverted", "maximal"])
def test_a_quarter_of_attackers_does_not_turn_what_the_others_agree_on(how, attack):
    rng = np.random.default_rng(0)
    slopes = 40 * rng.standard_normal(500)
    rows = np.rint(slopes + 15 * rng.standard_normal((16, 500))).clip(-127, 127).astype(np.int8)
    honest = combine(rows, *how).astype(float)
    rows[:4] = -rows[:4] if attack == "inverted" else np.where(rows[:4] > 0, -127, 127)
    attacked = combine(rows, *how).astype(float)
    votes = (attacked != NO_VOTE) & (honest != NO_VOTE) & (np.abs(slopes) > 20)
    assert np.mean(np.sign(attacked[votes]) == np.sign(slopes[votes])) > 0.99


# ---- by the run's policy --------------------------------------------------------------------------------------------

REPORTS = (0, 3, 7), np.frombuffer(b"\x20\x20\x10\xf0\x10\x80", np.int8)


def test_private_codes_stand_side_by_side(make_manifest):
    voices, codes = combined(*REPORTS, make_manifest())
    assert voices == (0, 3, 7)
    assert codes.tobytes() == b"\x20\x20\x10\xf0\x10\x80"


def test_shared_codes_are_one_row(make_manifest):
    voices, codes = combined(*REPORTS, make_manifest(policy="shared", combine="majority"))
    assert voices == (SHARED,)
    assert codes.tolist() == [32, NO_VOTE]


def test_groups_are_by_the_number_of_the_node(make_manifest):
    voices, codes = combined(*REPORTS, make_manifest(policy="groups", groups=4))
    assert voices == (GROUP_0, GROUP_0 + 3)
    assert codes.reshape(2, 2).tolist() == [[32, 32], [23, -16]]  # nodes 3 and 7: 16 √2 = 22.6, and one vote


@pytest.mark.parametrize("policy", ["private", "shared"])
def test_a_round_without_reports_has_no_participants(make_manifest, policy):
    voices, codes = combined((), np.zeros(0, np.int8), make_manifest(policy=policy))
    assert voices == ()
    assert codes.size == 0
    assert codes.dtype == np.int8
