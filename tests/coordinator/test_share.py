"""The cap on a node's share: whom it cuts, by how much, and what a ledger proves of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from coordinator.audit import audit
from coordinator.config import ConfigError, ServiceConfig, validate
from coordinator.ledger import Checkpoint, Ledger
from coordinator.share import capped
from transport.messages import PROTOCOL_VERSION, Hello, Report
from zo.codes import NO_VOTE
from zo.commit import decode_entry
from zo.packing import codes_of, pack
from zo.replica import Replica
from zo.weights import zeros


def norms(codes):
    return np.sqrt((np.where(codes == NO_VOTE, 0, codes).astype(np.float64) ** 2).sum(1))


def test_who_is_longer_than_twice_the_median_is_cut_to_it():
    codes = np.array([[30, 0], [0, -40], [24, 32], [127, -127]], np.int8)
    found, is_cut = capped(codes, 2.0)
    assert is_cut.tolist() == [False, False, False, True]
    assert found.tolist() == [[30, 0], [0, -40], [24, 32], [56, -56]]  # 80 / sqrt(2) = 56.6


def test_codes_of_4_bits_stay_codes_of_4_bits():
    codes = np.array([[24, 0], [0, -24], [24, 0], [84, -84]], np.int8)
    assert capped(codes, 2.0, 12)[0].tolist() == [
        [24, 0],
        [0, -24],
        [24, 0],
        [24, -24],
    ]  # 48 / sqrt(2) = 33.9


@pytest.mark.parametrize("bits", [4, 1])
def test_a_round_of_narrow_codes_is_committed(make_manifest, virtual_coordinator, bits):
    coordinator = virtual_coordinator(make_manifest(bits=bits, directions=4), ServiceConfig(quorum=3))
    manifest = coordinator.manifest
    greet(coordinator)
    most = 84 if bits == 4 else 32
    reports = (
        ([0, 12, 0, 0], [12, 0, 0, 0], [most] * 4) if bits == 4 else ([NO_VOTE] * 3 + [32],) * 2 + ([32] * 4,)
    )
    for node, codes in enumerate(reports):
        packed = pack(np.array(codes, np.int8), bits)
        coordinator.message(b"%d" % node, bytes([node] * 32), Report(0, packed))
    committed = codes_of(coordinator.commits[0], manifest).reshape(3, 4).tolist()
    assert committed[:2] == [list(each) for each in reports[:2]]
    assert committed[2] == ([0] * 4 if bits == 4 else [32] * 4)


def test_within_the_limit_nothing_changes():
    codes = np.array([[30, 0], [0, -40], [80, 0]], np.int8)
    found, is_cut = capped(codes, 2.0)
    assert found is codes
    assert not is_cut.any()


@pytest.mark.parametrize(
    "codes", [np.zeros((0, 2), np.int8), np.array([[127]], np.int8), np.array([[1], [127]], np.int8)]
)
def test_one_or_two_nodes_have_no_median_to_be_compared_with(codes):
    assert capped(codes, 1.0)[0] is codes


def test_nodes_without_votes_do_not_lower_the_median():
    codes = np.array([[NO_VOTE] * 2, [NO_VOTE] * 2, [0, 0], [40, 0], [0, 40], [70, NO_VOTE]], np.int8)
    found, is_cut = capped(codes, 2.0)
    assert not is_cut.any()
    found, is_cut = capped(codes, 1.5)
    assert found[-1].tolist() == [59, NO_VOTE]  # rounded towards 0
    assert is_cut.tolist() == [False] * 5 + [True]


shapes = st.tuples(st.integers(1, 9), st.integers(1, 5))


@given(arrays.arrays(np.int8, shapes, elements=st.integers(-128, 127)), st.floats(1, 10))
def test_nobody_is_longer_than_its_share_and_no_code_changes_its_sign_or_grows(codes, share):
    found, is_cut = capped(codes, share)
    own = norms(codes)
    if (own > 0).sum() > 2:
        limit = round(share * 256) / 256 * np.sort(own[own > 0])[(own > 0).sum() // 2]
        assert (norms(found) <= limit * (1 + 1e-9)).all()
    assert (np.abs(found, dtype=np.int16) <= np.abs(codes, dtype=np.int16)).all()
    assert ((np.sign(found) == np.sign(codes)) | (found == 0)).all()
    assert ((found == NO_VOTE) == (codes == NO_VOTE)).all()
    assert np.array_equal(found[~is_cut], codes[~is_cut])


@given(arrays.arrays(np.int8, shapes, elements=st.integers(-128, 127)), st.permutations(range(9)))
def test_the_order_of_nodes_changes_nothing(codes, order):
    chosen = [row for row in order if row < len(codes)]
    assert np.array_equal(capped(codes[chosen], 2.0)[0], capped(codes, 2.0)[0][chosen])


@pytest.mark.attack
def test_four_of_sixteen_at_the_limit_have_no_more_than_twice_an_honest_share():
    """And the exponent may have risen on their account: the others' codes are small."""
    rng = np.random.default_rng(0)
    honest = np.clip(rng.normal(0, 12, (12, 8)).round(), -127, 127).astype(np.int8)
    codes = np.concatenate([honest, np.full((4, 8), 127, np.int8)])
    found, is_cut = capped(codes, 2.0)
    assert is_cut[12:].all()
    assert norms(found)[12:].max() <= 2 * np.sort(norms(codes))[8]


def test_few_honest_nodes_of_one_kind_are_cut_and_these_hardly():
    """Gaussian slopes, 8 directions: 1 in 1,000 node-rounds, by a tenth."""
    rng = np.random.default_rng(1)
    cut = rounds = 0
    for _ in range(1000):
        codes = np.clip(rng.normal(0, 32, (16, 8)).round(), -127, 127).astype(np.int8)
        found, is_cut = capped(codes, 2.0)
        cut, rounds = cut + int(is_cut.sum()), rounds + 16
        if is_cut.any():
            assert (norms(found)[is_cut] > 0.7 * norms(codes)[is_cut]).all()
    assert cut / rounds < 2e-3


def greet(coordinator):
    """Three nodes join."""
    manifest = coordinator.manifest
    base, tokenizer = bytes.fromhex(manifest.base.digest), bytes.fromhex(manifest.base.tokenizer_digest)
    for node in range(3):
        hello = Hello(PROTOCOL_VERSION, manifest.run_id, base, tokenizer, 0, manifest.run_id, f"n{node}")
        coordinator.message(b"%d" % node, bytes([node] * 32), hello)


@pytest.fixture
def played(make_manifest, virtual_coordinator):
    """Three rounds of three nodes, one of which always sends ±127."""
    coordinator = virtual_coordinator(make_manifest(), ServiceConfig(quorum=3))
    greet(coordinator)
    for number in range(3):
        for node, codes in enumerate((b"\x03\x04", b"\x04\x03", b"\x7f\x81")):
            coordinator.message(b"%d" % node, bytes([node] * 32), Report(number, codes))
    return coordinator


def test_the_commit_has_the_capped_codes_and_it_is_noted_whose(played):
    assert played.commits[0].codes == b"\x03\x04\x04\x03\x07\xf9"  # 5 × 2 / sqrt(2) = 7.07
    assert [member.num_capped for member in played.conductor.members.values()] == [0, 0, 3]
    text = "round 0: the codes of node 2 (n2) were scaled down to 2 times the median participant's"
    assert played.noted("capped")[0] == text


def test_a_ledger_of_capped_codes_proves_itself(played, tmp_path):
    """Steps are computed from what is committed: nobody who verifies needs to know the cap."""
    manifest = played.manifest
    with Ledger(tmp_path / "ledger.sqlite", manifest.run_id, create=True) as ledger:
        for frame in played.frames:
            ledger.append(decode_entry(frame), frame)
        for number, (digest, scale) in played.checkpoints.items():
            ledger.checkpoint(Checkpoint(number, digest, scale))
        assert audit(manifest, Replica(manifest, zeros(500)), ledger, lambda *_: None).rounds == 3


@pytest.mark.parametrize("share", [0.5, 0, float("nan")])
def test_a_share_below_one_would_cut_the_median(share):
    with pytest.raises(ConfigError, match="max_share"):
        validate(ServiceConfig(max_share=share))
