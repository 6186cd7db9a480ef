"""Public audits: whose answers are far, how soon that is found, and how rarely it is found of an honest node."""

import numpy as np
import pytest

from coordinator.consensus import AUDITS_PER_FALSE_ALARM, FAR_RATE, Consensus, audit_sample, tolerance

NODES = 8
LOSSES = 4.5


def truth(number):
    """The losses of a sound node in audit `number`, and its arithmetic's noise is no part of them."""
    rng = np.random.default_rng([7, number])
    level, gap = LOSSES - number / 1000, rng.normal(0, 0.005)
    return level + gap / 2, level - gap / 2


def audits(consensus, num, answer_by_node=None, noise=1e-6, nodes=NODES):
    """Found nodes by the number of the audit in which they were; some nodes answer in ways of their own."""
    rng = np.random.default_rng(3)
    found = {}
    for number in range(num):
        plus, minus = truth(number)
        answers = {}
        for node in range(nodes):
            own = (plus * (1 + noise * rng.normal()), minus * (1 + noise * rng.normal()))
            answers[node] = (answer_by_node or {}).get(node, lambda own: own)(own)
        for finding in consensus.observe(answers):
            assert finding.node not in found
            found[finding.node] = number
    return found


FAULTS = {
    "another base": lambda own: (own[0] + 0.3, own[1] + 0.3),
    "swapped signs": lambda own: (own[1], own[0]),
    "an adapter without effect": lambda own: (sum(own) / 2, sum(own) / 2),
    "made up": lambda own: (1.0, 1.0),
    "not a number": lambda own: (float("nan"), own[1]),
    "infinite": lambda own: (float("inf"), float("-inf")),
    "never an answer": lambda own: None,
}


@pytest.mark.attack
@pytest.mark.parametrize("fault", FAULTS)
def test_who_is_broken_or_lies_is_found_within_a_dozen_audits_and_nobody_else(fault):
    found = audits(Consensus(1e-3), 40, {2: FAULTS[fault], 5: FAULTS[fault]})
    assert found.keys() == {2, 5}
    assert max(found.values()) <= 15


@pytest.mark.attack
def test_three_of_eight_with_one_story_do_not_turn_it_round():
    found = audits(Consensus(1e-3), 40, dict.fromkeys((0, 1, 2), FAULTS["another base"]))
    assert found.keys() == {0, 1, 2}


def test_four_far_answers_in_a_row_are_enough_and_three_are_not():
    consensus = Consensus(1e-3)
    assert audits(consensus, 3, {1: FAULTS["made up"]}) == {}
    assert audits(consensus, 1, {1: FAULTS["made up"]}) == {1: 0}


def test_one_slip_is_forgiven():
    slips = iter(range(10**6))

    def one_in_hundred(own):
        return (0.0, 0.0) if next(slips) % 100 == 0 else own

    assert audits(Consensus(1e-3), 2000, {1: one_in_hundred}) == {}


def test_an_honest_node_that_is_far_as_often_as_it_may_is_accused_as_rarely_as_is_said():
    """100 nodes in 2,000 audits: 0.2 accusations, if it were one in a million of a node's audits."""
    rng = np.random.default_rng(0)
    far = rng.random((2000, 100)) < FAR_RATE
    consensus = Consensus(1e-3)
    found = []
    for number, row in enumerate(far):
        plus, minus = truth(number)
        found += consensus.observe(
            {node: (0.0, 0.0) if each else (plus, minus) for node, each in enumerate(row)}
        )
    assert AUDITS_PER_FALSE_ALARM == 10**6
    assert found == []


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5, 1e-4])
def test_sound_nodes_agree_within_their_noise_whatever_it_is(noise):
    assert audits(Consensus(1e-3), 500, noise=noise) == {}


def test_one_machine_of_another_kind_among_equal_ones_is_sound():
    """The others agree to the last bit, so their noise says nothing; the tolerance does."""
    other = {3: lambda own: (own[0] * (1 + 2e-6), own[1] * (1 - 3e-6))}
    assert audits(Consensus(1e-3), 300, other, noise=0.0) == {}


def test_another_quantisation_is_sound_where_the_manifest_allows_it_and_only_there(make_manifest):
    """As NF4 was measured beside float32 on a small base: losses 3% higher, slopes that differ by half."""
    rng = np.random.default_rng(0)
    nf4 = {4: lambda own: (1.03 * own[0] + rng.normal(0, 0.003), 1.03 * own[1] + rng.normal(0, 0.003))}
    free = Consensus(tolerance(make_manifest(any_quantization=True)))
    assert audits(free, 300, nf4) == {}
    assert audits(Consensus(tolerance(make_manifest())), 20, nf4).keys() == {4}


def test_tolerances_are_those_of_the_manifests_arithmetic(make_manifest):
    exact, half = tolerance(make_manifest()), tolerance(make_manifest(dtype="bfloat16"))
    int8, free = tolerance(make_manifest(quantize="int8")), tolerance(make_manifest(any_quantization=True))
    assert exact < half == int8 < free


@pytest.mark.parametrize("answers", [{}, {0: (1.0, 1.0)}, {0: (1.0, 1.0), 1: (9.0, 9.0)}])
def test_of_two_nobody_knows_which_is_wrong(answers):
    consensus = Consensus(1e-3)
    for _ in range(20):
        assert consensus.observe(answers) == []


def test_where_most_answers_are_not_finite_nobody_is_accused():
    """The weights may have gone astray for all."""
    consensus = Consensus(1e-3)
    answers = {node: (float("nan"), 1.0) if node < 5 else (1.0, 1.0) for node in range(NODES)}
    for _ in range(20):
        assert consensus.observe(answers) == []


def test_who_is_found_is_said_once_with_the_count():
    consensus = Consensus(1e-3)
    reasons = []
    for number in range(12):
        plus, minus = truth(number)
        answers = dict.fromkeys(range(3), (plus, minus)) | {3: None}
        reasons += [finding.reason for finding in consensus.observe(answers)]
    assert reasons == ["4 of its 4 answers to public audits are far from the other nodes'"]


def test_audits_are_as_frequent_as_asked_and_nobody_foresees_them():
    rounds = [r for r in range(20_000) if audit_sample(b"a" * 32, 0, 16, r) is not None]
    assert 1100 < len(rounds) < 1400
    assert all(audit_sample(b"a" * 32, 0, 1, r) is not None for r in range(50))
    assert audit_sample(b"a" * 32, 0, 0, 5) is None
    of = [
        audit_sample(secret, agent, 1, r)
        for secret in (b"a" * 32, b"b" * 32)
        for agent in (0, 1)
        for r in (0, 1)
    ]
    assert len(set(of)) == 8
    assert all(0 <= sample < 2**32 for sample in of)
