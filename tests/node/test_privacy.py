"""Differential privacy: what one row may say is bounded, and what is drawn and added is what is accounted for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.data import Windows
from node.losses import RowLosses, row_losses
from node.privacy import GRID, Mechanism, Release, in_parts
from node.probe import Probe
from zo.codes import NO_VOTE

KEY = (17, 4)
NODE = 3
EPSILON = 2.0**-7
FEW = settings(max_examples=200, deadline=None)
NUMBERS = st.floats(width=64, allow_nan=True, allow_infinity=True)


def seeded(seed):
    """As the system's entropy, and the same each time."""
    rng = np.random.default_rng(seed)
    return rng.bytes


def mechanism(rate=1.0, noise=1.0, clip=1.0, entropy=None):
    release = Release(rate=rate, noise=noise, clip=clip)
    return Mechanism(release) if entropy is None else Mechanism(release, entropy)


@st.composite
def batches(draw):
    rows, width = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    return draw(arrays(np.float64, (rows, width), elements=NUMBERS))


@FEW
@given(batches(), st.floats(1e-6, 1e6))
def test_no_row_says_more_than_the_bound(said, clip):
    parts = in_parts(said, clip)
    assert all(sum(int(part) ** 2 for part in row) <= GRID**2 for row in parts), (
        "in integers: no rounding hides it"
    )


@FEW
@given(arrays(np.float64, (7, 3), elements=st.floats(-100, 100)), st.floats(0.01, 1000))
def test_a_row_within_the_bound_keeps_its_value_and_a_longer_one_its_direction(said, clip):
    parts = in_parts(said, clip) * (clip / GRID)
    norms = np.linalg.norm(said, axis=1, keepdims=True)
    expected = said * np.minimum(1, clip / np.maximum(norms, 1e-300))
    assert np.abs(parts - expected).max() <= 3 * clip / GRID


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_says_nothing_at_all(wrong):
    said = np.array([[0.5, wrong], [0.25, -0.25]])
    assert np.array_equal(in_parts(said, 1.0), in_parts(np.array([[0.0, 0.0], [0.25, -0.25]]), 1.0))


@FEW
@given(batches(), st.data())
def test_one_row_moves_the_sum_by_at_most_the_bound(said, data):
    """By brute force: any row blank, or any other in its place; with the same noise, only the row is left."""
    if not len(said):
        return
    which = data.draw(st.integers(0, len(said) - 1))
    blank, other = said.copy(), said.copy()
    blank[which] = 0
    other[which] = data.draw(arrays(np.float64, said.shape[1], elements=NUMBERS))
    clip = data.draw(st.floats(1e-3, 1e3))
    sums = [mechanism(clip=clip, entropy=seeded(0)).noisy_sum(each) for each in (said, blank, other)]
    assert np.linalg.norm(sums[0] - sums[1]) <= clip * (1 + 1e-9)
    assert np.linalg.norm(sums[0] - sums[2]) <= 2 * clip * (1 + 1e-9)


def test_the_noise_has_the_moments_it_is_accounted_with():
    noise, clip, count = 1.7, 0.25, 40_000
    found = mechanism(noise=noise, clip=clip, entropy=seeded(1)).noisy_sum(np.zeros((3, count))) / clip
    assert abs(found.mean()) < 4 * noise / math.sqrt(count)
    assert found.std() == pytest.approx(noise, rel=4 / math.sqrt(2 * count))
    assert np.mean((found / noise) ** 4) == pytest.approx(3, abs=4 * math.sqrt(96 / count))
    assert np.mean(np.abs(found) > 3 * noise) == pytest.approx(0.0027, abs=0.001)
    assert abs(np.corrcoef(found[::2], found[1::2])[0, 1]) < 4 / math.sqrt(count / 2)


def test_noise_is_whole_parts_of_the_grid():
    found = mechanism(noise=3.0, clip=1.0).noisy_sum(np.zeros((1, 1000))) * GRID
    assert np.array_equal(found, np.rint(found))
    assert len(set(found)) > 990


def test_no_noise_is_used_twice():
    made = mechanism()
    said = np.zeros((1, 5))
    assert not np.array_equal(made.noisy_sum(said), made.noisy_sum(said))
    assert not np.array_equal(mechanism().noisy_sum(said), mechanism().noisy_sum(said))


def test_rows_are_drawn_independently_with_the_rate_that_is_accounted():
    """Poisson sampling: sizes are binomial, every row and every pair of rows is as likely as any other."""
    rate, num_rows, draws = 0.2, 40, 20_000
    made = mechanism(rate=rate, entropy=seeded(2))
    chosen = np.zeros((draws, num_rows))
    for row in chosen:
        row[made.rows(num_rows)] = 1
    sizes = chosen.sum(1)
    variance = num_rows * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(num_rows * rate, abs=4 * math.sqrt(variance / draws))
    assert sizes.var() == pytest.approx(variance, rel=0.05), "a fixed size would have none"
    share = math.sqrt(rate * (1 - rate) / draws)
    assert np.abs(chosen.mean(0) - rate).max() < 4.5 * share
    together = chosen.T @ chosen / draws
    np.fill_diagonal(together, rate**2)
    assert np.abs(together - rate**2).max() < 5 * math.sqrt(rate**2 * (1 - rate**2) / draws)
    following = (chosen[1:] * chosen[:-1]).mean()
    assert following == pytest.approx(rate**2, rel=0.02), "one batch says nothing of the next"


def test_at_rate_one_every_row_is_there_once():
    assert np.array_equal(mechanism(rate=1).rows(7), np.arange(7))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0 and at most 1, got 0.0"),
        ({"rate": 1.5}, "rate must be above 0"),
        ({"noise": 0.0}, "noise must be above 0"),
        ({"noise": math.nan}, "noise must be above 0"),
        ({"noise": 1e9}, "at most 1048576"),
        ({"clip": 0.0}, "clip must be a positive number"),
        ({"clip": math.inf}, "clip must be a positive number"),
    ],
)
def test_a_release_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Release(**({"rate": 0.5, "noise": 1.0, "clip": 1.0} | wrong))


# ---- in a probe ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter():
    base = load_base(embedded.path(), threads=1)
    return Adapter(base, key=KEY, targets=("q_proj",), rank=2, alpha=4, train="B")


@pytest.fixture(scope="module")
def weights(adapter):
    return np.random.default_rng(1).integers(-(2**24), 2**24, adapter.size).astype(np.int32)


def windows(num_rows=9, changed=None):
    tokens = np.random.default_rng(0).integers(2, 500, (num_rows, 12)).astype(np.int32)
    if changed is not None:
        tokens[changed] = np.random.default_rng(9).integers(2, 500, 12)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


def make_probe(adapter, rows, made, **changes):
    form = {"key": KEY, "epsilon": EPSILON, "directions": 4, "batch_size": 4, "seed": 9} | changes
    return Probe(adapter, rows, mechanism=made, **form)


@pytest.mark.parametrize("at_once", [0, 1, 4])
@pytest.mark.parametrize("sides", [1, 2])
def test_without_bound_and_noise_slopes_are_the_plain_ones_of_all_rows(adapter, weights, sides, at_once):
    """Nine rows in passes of four: what is measured does not depend on how rows are spread over passes."""
    rows = windows()
    made = mechanism(noise=1e-9, clip=100.0)
    private, loss = make_probe(adapter, rows, made, sides=sides, at_once=at_once).slopes(weights, 5, NODE)
    plain, plain_loss = make_probe(adapter, rows, None, sides=sides, batch_size=9).slopes(weights, 5, NODE)
    rounding = (
        2 * loss * np.finfo(np.float32).eps / EPSILON
    )  # passes of other sizes are added up in another order
    assert np.allclose(private, plain, rtol=2e-3, atol=max(2e-3 * np.abs(plain).max(), rounding))
    assert loss == pytest.approx(plain_loss, rel=1e-5)


@pytest.mark.parametrize("sides", [1, 2])
def test_one_row_moves_a_round_by_at_most_what_is_accounted(adapter, weights, sides):
    """The losses of one row are made as bad as can be, by brute force; everything else stays."""
    clip, directions, num_rows = 1e-3, 4, 9
    width = 2 * EPSILON if sides == 2 else EPSILON * (directions - 1) / directions

    def slopes(changed, says):
        rng = np.random.default_rng(0)

        def objective(model, batch):
            found = row_losses(model, batch)
            if says is None:
                return found
            sums = found.sums.copy()
            mine = (batch.tokens == windows(num_rows, changed).tokens[4]).all(1)
            sums[mine] = rng.choice(says, np.count_nonzero(mine))
            return RowLosses(sums, found.counts)

        made = mechanism(clip=clip, noise=1e-6, entropy=seeded(3))
        form = {"sides": sides, "objective": objective}
        found, _ = make_probe(adapter, windows(num_rows, changed), made, **form).slopes(weights, 5, NODE)
        return found * width * num_rows  # the sums again

    honest = slopes(None, None)
    for says in ([0.0, 1e9], [-1e300, 1e300], [math.nan, 1.0], [math.inf, 0.0], [0.0]):
        moved = slopes(None, says) - honest
        if sides == 2:  # every direction is a release of its own
            assert np.abs(moved).max() <= 2 * clip * (1 + 1e-6)
        else:
            assert np.linalg.norm(moved) <= 2 * clip * (1 + 1e-6)
    other = slopes(4, None) - honest
    assert np.any(other != 0), "the test sees what a row says"
    assert np.abs(other).max() <= 2 * clip * (1 + 1e-6)


def test_a_loss_that_is_not_finite_takes_no_vote_away(adapter, weights):
    """A vote that is missing would say that this row is there."""
    made = mechanism(clip=0.1)
    broken = make_probe(
        adapter,
        windows(),
        made,
        objective=lambda _, batch: RowLosses(
            np.full(len(batch.tokens), math.nan), np.ones(len(batch.tokens))
        ),
    )
    assert not np.any(broken.probe(weights, 0, NODE, 0).codes == NO_VOTE)


def test_a_batch_without_rows_is_noise(adapter, weights):
    def unasked(*_):
        raise AssertionError

    empty = make_probe(
        adapter, windows(), mechanism(rate=1e-9, clip=1.0, entropy=lambda n: b"\x99" * n), objective=unasked
    )
    probed = empty.probe(weights, 0, NODE, 0)
    assert probed.codes.any()
    assert math.isnan(probed.loss)


def test_a_node_sees_how_many_of_its_rows_were_cut(adapter, weights):
    made = mechanism(clip=1e-12)
    make_probe(adapter, windows(), made).probe(weights, 0, NODE, 0)
    assert made.num_rows == made.num_clipped == 4 * 9
