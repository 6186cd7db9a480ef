import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.bucket import TokenBucket


def test_a_full_bucket_is_a_burst_and_then_the_rate():
    bucket = TokenBucket(rate_per_s=2, burst=3, now=0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(now) for now in (0.4, 0.5, 0.9, 1.0)] == [False, True, False, True]


def test_tokens_do_not_pile_up():
    bucket = TokenBucket(rate_per_s=1, burst=2, now=0.0)
    assert [bucket.take(1e9) for _ in range(3)] == [True, True, False]
    bucket.grant(100)
    assert [bucket.take(1e9) for _ in range(3)] == [True, True, False]


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3)), max_size=50))
def test_never_more_than_burst_plus_rate_plus_grants(steps):
    bucket, now, granted, taken = TokenBucket(5, 7, 0.0), 0.0, 0, 0
    for wait, grant in steps:
        now += wait
        bucket.grant(grant)
        granted += grant
        taken += bucket.take(now)
    assert taken <= 7 + 5 * now + granted + 1e-6


@given(st.lists(st.floats(0.2, 10), max_size=50))
def test_who_keeps_to_the_rate_is_never_stopped(waits):
    bucket, now = TokenBucket(5.001, 1, 0.0), 0.0
    for wait in waits:
        assert bucket.take(now)
        now += wait


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0.5)])
def test_a_bucket_that_could_never_be_right(rate, burst):
    with pytest.raises(ValueError, match="a positive rate and room for one token"):
        TokenBucket(rate, burst, 0.0)
