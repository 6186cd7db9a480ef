"""Everything that is read from outside, fuzzed: no crash, no growth, no state that should not be."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import TARGETS, messages, mutated, seeds
from transport.messages import FromCoordinator, FromNode

pytestmark = pytest.mark.attack
targets = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)


def test_every_message_type_is_a_seed():
    from_node, from_coordinator = messages()
    assert {type(each) for each in from_node} == set(FromNode.__args__)
    assert {type(each) for each in from_coordinator} == set(FromCoordinator.__args__)


@targets
def test_what_is_well_formed_passes(target):
    for seed in seeds(target):
        target(seed)


@targets
@settings(max_examples=40)
@given(data=st.binary(max_size=400))
def test_junk(target, data):
    target(data)


@targets
@settings(max_examples=100)
@given(number=st.integers(0, 2**32))
def test_what_was_well_formed_before_some_bytes_were_changed(target, number):
    rng = random.Random(number)
    target(mutated(rng.choice(seeds(target)), rng))
