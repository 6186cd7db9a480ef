"""Bits that are in the field. Changing any breaks every run there is: its ledger replays to other weights."""

import numpy as np
import pytest

from zo import kernels, reference
from zo.codes import coefficients
from zo.directions import Direction, run_key, stack
from zo.weights import digest, zeros

RUN_ID = bytes.fromhex("000102030405060708090a0b0c0d0e0f")
KEY = run_key(RUN_ID)


@pytest.mark.parametrize("perturbation", [reference.perturbation, kernels.perturbation])
def test_the_first_32_entries_of_a_perturbation(perturbation):
    z = perturbation(KEY, Direction(node=1, sample=2, agent=3), 32)
    assert np.packbits(z > 0, bitorder="little").tobytes().hex() == "263b12b0"


def test_both_views_of_a_perturbation():
    weights = np.array([0, 2**28, -(2**28), 3], np.int32)
    plus, minus = kernels.perturbed(weights, KEY, Direction(1, 2), 1e-2)
    assert plus.astype("<f4").tobytes().hex() == "0ad7233ca4707d3fae4781bffed623bc"
    assert minus.astype("<f4").tobytes().hex() == "0ad723bcae47813fa4707dbf16d7233c"


def test_the_digest_after_two_rounds_of_three_nodes():
    weights = zeros(1000)
    rounds = [([127, -127, 33], 2**20), ([-1, -128, 64], 2**19 + 1)]
    for round, (codes, step) in enumerate(rounds):
        names = stack(Direction(node, round) for node in range(3))
        kernels.apply(weights, KEY, names, coefficients(np.array(codes, np.int8), step))
    assert digest(0, zeros(1000)).hex() == "76c249968d820089c17145d20e6b9dfa"
    assert digest(2, weights).hex() == "e612bcefb0c78a7a95dbdce5b0309068"
