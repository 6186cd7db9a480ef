"""Seals: whose signature proves a chain, and what a node makes of any other."""

import msgspec
import numpy as np
import pytest

from transport.exits import Exit
from transport.messages import (
    PROTOCOL_VERSION,
    Commit,
    Finished,
    Hello,
    History,
    Identify,
    Offer,
    Piece,
    Report,
    Resync,
    Sealed,
    Welcome,
)
from transport.seals import Signer, is_sealed
from transport.session import End, Session, StartOver, Transmit
from zo.commit import genesis
from zo.replica import Replica
from zo.snapshot import content_address, encode_snapshot
from zo.weights import zeros

SIGNER, OTHER = Signer(bytes(range(32))), Signer(bytes(32))
BASE, TOKENIZER = b"\xb0" * 16, b"\x70" * 16
EVERY = 4


def test_the_signature_is_pinned():  # changing it breaks every ledger and every node
    seal = SIGNER.seal(bytes(16), 300, b"\x01" * 16)
    assert SIGNER.public == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert seal.hex() == (
        "0a3d8100c17b0caa0a969d07000957547902439091d3ebde8831c433603b01e2"
        "e12757c28432717b75f793e1d1df289ad22b26ead0b5024d5e9be79086a9060b"
    )
    assert is_sealed(SIGNER.public, bytes(16), 300, b"\x01" * 16, seal)


@pytest.mark.attack
def test_a_seal_is_good_for_its_own_run_agent_round_head_and_key_alone():
    run = b"\x07" * 16
    seal = SIGNER.seal(genesis(run, 0), 8, b"\x01" * 16)
    assert is_sealed(SIGNER.public, genesis(run, 0), 8, b"\x01" * 16, seal)
    for public, origin, round, head in (
        (OTHER.public, genesis(run, 0), 8, b"\x01" * 16),
        (SIGNER.public, genesis(b"\x08" * 16, 0), 8, b"\x01" * 16),
        (SIGNER.public, genesis(run, 1), 8, b"\x01" * 16),
        (SIGNER.public, genesis(run, 0), 9, b"\x01" * 16),
        (SIGNER.public, genesis(run, 0), 8, b"\x02" * 16),
        ("ff" * 32, genesis(run, 0), 8, b"\x01" * 16),
    ):
        assert not is_sealed(public, origin, round, head, seal)
    for broken in (b"", seal[:-1], seal + b"\x00", bytes(64), seal[:-1] + bytes([seal[-1] ^ 1])):
        assert not is_sealed(SIGNER.public, genesis(run, 0), 8, b"\x01" * 16, broken)


class Chain:
    """What somebody who signs, or forges, would have nodes believe."""

    def __init__(self, manifest, agent=0, signer=SIGNER):
        self.manifest, self.agent, self.signer = manifest, agent, signer
        self.replica = Replica(manifest, zeros(500), agent=agent)
        self.commits = []

    def commit(self, step=1000):
        commit = Commit(len(self.commits), (step,), (-5,), (0,), b"\x01\x02", self.replica.head)
        self.replica.apply(commit)
        self.commits.append(commit)
        return commit

    def seal(self):
        round, head = self.replica.round, self.replica.head
        return Sealed(round, head, self.signer.seal(genesis(self.manifest.run_id, self.agent), round, head))


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(signer=SIGNER.public, digest_every=EVERY, rounds=1000)


@pytest.fixture
def chain(manifest):
    return Chain(manifest)


def joined(manifest, replica=None, agent=0):
    """A session that was welcomed, from round 0 or from what it has saved."""
    saved = (manifest, replica) if replica else None
    session = Session(manifest.run_id, BASE, TOKENIZER, "n", saved, agent=agent)
    session.on_link_up()
    round = replica.round if replica else 0
    session.on_message(Welcome(PROTOCOL_VERSION, 0, manifest.encode(), round, -4, None), 0.0)
    if replica is None:
        session.opened(Replica(manifest, zeros(500), agent=agent), 0.0)
    return session


def says_hello(effects):
    return [type(effect.message) for effect in effects if isinstance(effect, Transmit)] == [Hello]


def follow(session, chain, rounds):
    for _ in range(rounds):
        session.on_message(chain.commit(), 0.0)


def test_a_node_goes_on_with_the_coordinators_seal(manifest, chain):
    session = joined(manifest)
    for _ in range(3):
        follow(session, chain, EVERY)
        assert session.next_probe() is None  # the seal is due
        assert session.on_message(chain.seal(), 0.0) == []
        assert session.next_probe() == (session.replica.round, -5)


def test_between_two_seals_a_node_works(manifest, chain):
    session = joined(manifest)
    follow(session, chain, EVERY - 1)
    assert session.next_probe() == (EVERY - 1, -5)


@pytest.mark.attack
@pytest.mark.parametrize("forged_in", [0, 5])
def test_a_forged_commit_from_a_relay_that_has_the_connection_key_ends_at_the_seal(
    manifest, chain, forged_in
):
    """It can say anything over the connection, but not sign."""
    session = joined(manifest)
    relay = Chain(manifest, signer=OTHER)
    for round in range(EVERY * (forged_in // EVERY + 1)):
        session.on_message(relay.commit(9999 if round == forged_in else 1000), 0.0)
        chain.commit()
        if chain.replica.round == EVERY and forged_in > EVERY:
            assert session.on_message(chain.seal(), 0.0) == []
    [end] = session.on_message(relay.seal(), 0.0)
    assert end.code is Exit.FORGED
    last = relay.replica.round
    assert f"the seal of round {last} was not made by this run's coordinator" in end.reason
    assert f"between round {last - EVERY} and {last}" in end.reason
    assert session.replica.round == last
    assert session.next_probe() is None


@pytest.mark.attack
def test_the_true_seal_after_a_forged_commit_names_the_round(manifest, chain):
    session = joined(manifest)
    relay = Chain(manifest)
    for _ in range(EVERY):
        session.on_message(relay.commit(9999), 0.0)
        chain.commit()
    [end] = session.on_message(chain.seal(), 0.0)
    assert end.code is Exit.FORGED
    assert "two ledgers of this run, which part between round 0 and 4" in end.reason


@pytest.mark.attack
def test_of_two_ledgers_of_one_run_a_node_refuses_the_other(manifest, chain):
    """A run directory and its copy, both served: the node's state is of the one, the seal of the other."""
    for _ in range(6):
        chain.commit()
    fork = Chain(manifest)
    for step in (1000,) * 5 + (7,):
        fork.commit(step)
    session = joined(manifest, chain.replica)
    [end] = session.on_message(fork.seal(), 0.0)
    assert end.code is Exit.FORGED
    assert f"signed {fork.replica.head.hex()} as the head of round 6" in end.reason


@pytest.mark.attack
def test_a_seal_of_another_agent_or_run_is_none(make_manifest):
    manifest = make_manifest(signer=SIGNER.public, digest_every=EVERY, count=2)
    other_run = make_manifest(signer=SIGNER.public, digest_every=EVERY, count=2, nonce="00" * 16)
    own = Chain(manifest)
    for _ in range(EVERY):
        own.commit()
    replays = []
    for run, agent in ((manifest, 1), (other_run, 0)):
        origin = genesis(run.run_id, agent)
        replays.append(Sealed(EVERY, own.replica.head, SIGNER.seal(origin, EVERY, own.replica.head)))
    for replay in replays:
        session = joined(manifest)
        follow(session, Chain(manifest), EVERY)
        [end] = session.on_message(replay, 0.0)
        assert end.code is Exit.FORGED


@pytest.mark.attack
def test_a_seal_of_an_earlier_round_proves_nothing_later(manifest, chain):
    session = joined(manifest)
    follow(session, chain, EVERY)
    first = chain.seal()
    session.on_message(first, 0.0)
    follow(session, chain, EVERY)
    assert session.on_message(first, 0.0) == []
    assert session.next_probe() is None
    assert says_hello(session.on_message(chain.commit(), 0.0))


@pytest.mark.attack
def test_who_withholds_the_seal_gets_no_code_and_no_further_round(manifest, chain):
    session = joined(manifest)
    follow(session, chain, EVERY)
    assert session.next_probe() is None
    assert says_hello(session.on_message(chain.commit(), 0.0))
    assert session.replica.round == EVERY


@pytest.mark.attack
def test_the_end_of_the_run_is_sealed_too(make_manifest):
    manifest = make_manifest(signer=SIGNER.public, digest_every=EVERY, rounds=EVERY + 2)
    chain, session = Chain(manifest), joined(manifest)
    follow(session, chain, EVERY)
    session.on_message(chain.seal(), 0.0)
    follow(session, chain, 2)
    finished = Finished(EVERY + 2, chain.replica.digest())
    assert says_hello(session.on_message(finished, 0.0))
    session.on_message(Welcome(PROTOCOL_VERSION, 0, b"", EVERY + 2, -5, None), 0.0)
    session.on_message(chain.seal(), 0.0)
    ends = [each for each in session.on_message(finished, 0.0) if isinstance(each, End)]
    assert [each.code for each in ends] == [Exit.OK]


def test_what_a_node_has_saved_is_sealed_before_it_goes_on(manifest, chain):
    for _ in range(6):
        chain.commit()
    session = joined(manifest, chain.replica)
    assert session.next_probe() is None
    assert session.on_message(chain.seal(), 0.0) == []
    assert session.next_probe() is not None


def test_a_history_has_one_seal_for_all_of_it(manifest, chain):
    frames = tuple(chain.commit().encode() for _ in range(3 * EVERY + 1))
    session = joined(manifest)
    session.on_message(History(frames), 0.0)
    assert session.next_probe() is None
    assert session.on_message(chain.seal(), 0.0) == []
    assert session.next_probe() == (3 * EVERY + 1, -5)


def test_a_seal_of_rounds_that_are_missing_here_says_so(manifest, chain):
    session = joined(manifest)
    chain.commit()
    assert says_hello(session.on_message(chain.seal(), 0.0))


def test_who_starts_over_needs_every_seal_again(manifest, chain):
    session = joined(manifest)
    follow(session, chain, EVERY)
    session.on_message(chain.seal(), 0.0)
    session.opened(Replica(manifest, zeros(500)), 0.0)
    session.on_message(Welcome(PROTOCOL_VERSION, 0, manifest.encode(), EVERY, -4, None), 0.0)
    session.on_message(History(tuple(each.encode() for each in chain.commits)), 0.0)
    assert session.next_probe() is None
    session.on_message(chain.seal(), 0.0)
    assert session.next_probe() == (EVERY, -5)


def test_a_snapshots_head_is_sealed_before_what_follows_it(manifest, chain):
    """`Follow` is answered by the seal of what the node goes on from."""
    for _ in range(EVERY + 2):
        chain.commit()
    offer = Offer(b"\xcc" * 16, 3, 500, 0, 0, 10**6, 10**6, True)
    session = joined(manifest, chain.replica)
    welcome = Welcome(PROTOCOL_VERSION, 0, manifest.encode(), EVERY + 2, -4, None)
    session.on_message(msgspec.structs.replace(welcome, offer=offer), 0.0)
    session.on_message(welcome, 0.0)
    assert says_hello(session.on_message(History((chain.commit().encode(),)), 0.0))


def test_without_a_signer_in_the_manifest_nothing_is_sealed(make_manifest):
    manifest = make_manifest(digest_every=EVERY)
    chain, session = Chain(manifest), joined(manifest)
    follow(session, chain, EVERY)
    assert session.next_probe() == (EVERY, -5)


def proven(manifest, chain, rounds):
    """A session that has followed the run's coordinator for so many rounds."""
    session = joined(manifest)
    for _ in range(rounds // EVERY):
        follow(session, chain, EVERY)
        session.on_message(chain.seal(), 0.0)
    return session


def leap(session, replica, manifest, round):
    """What a session does with a snapshot, after a welcome that names a round."""
    data = encode_snapshot(replica, manifest)
    content = content_address(data)
    offer = Offer(content, replica.round, len(data), 0, 0, 10**9, 10**9, True)
    session.on_message(Identify(), 0.0)
    session.on_message(Welcome(PROTOCOL_VERSION, 0, b"", round, -5, offer), 0.0)
    return session.on_message(Piece(content, 0, len(data), data), 1.0)


def codes_given_to(session, chain):
    """Rounds that a session reports for as somebody goes on with a chain, until it wants to see a seal."""
    rounds = []
    while (wanted := session.next_probe()) is not None:
        rounds.append(wanted[0])
        effects = session.on_probed(wanted[0], np.array([3, -4], np.int8), 1.0, 2.0)
        assert [type(each.message) for each in effects] == [Report]
        session.on_message(chain.commit(9999), 2.0)
    return rounds


@pytest.mark.attack
@pytest.mark.parametrize("at", [EVERY + 1, 5 * EVERY, 1000])
def test_a_forged_snapshot_is_worth_nothing_without_a_seal(manifest, chain, at):
    session = proven(manifest, chain, EVERY)
    relay = Chain(manifest)
    for _ in range(at):
        relay.commit(9)
    leap(session, relay.replica, manifest, at)
    assert session.replica.round == at
    assert codes_given_to(session, relay) == []
    assert says_hello(session.on_message(Finished(at, relay.replica.digest()), 2.0))
    session.on_message(Welcome(PROTOCOL_VERSION, 0, b"", at, -5, None), 2.0)
    [end] = session.on_message(msgspec.structs.replace(relay.seal(), signature=bytes(64)), 2.0)
    assert end.code is Exit.FORGED


@pytest.mark.attack
def test_a_forged_snapshot_of_the_past_is_not_even_looked_at(manifest, chain):
    session = proven(manifest, chain, 2 * EVERY)
    for at in (1, EVERY, 2 * EVERY):
        relay = Chain(manifest)
        for _ in range(at):
            relay.commit(9)
        leap(session, relay.replica, manifest, at)
        assert session.replica.head == chain.replica.head


@pytest.mark.attack
def test_nothing_leads_back_to_an_earlier_snapshot(manifest, chain):
    session = proven(manifest, chain, EVERY)
    early = Replica(manifest, zeros(500))
    for commit in chain.commits:
        early.apply(commit)
    follow(session, chain, 2)
    leap(session, early, manifest, EVERY + 2)
    assert session.replica.round == EVERY + 2


@pytest.mark.attack
def test_a_true_snapshot_is_followed_once_its_seal_is_there(manifest, chain):
    session = joined(manifest)
    for _ in range(EVERY + 1):
        chain.commit()
    leap(session, chain.replica, manifest, EVERY + 1)
    assert session.next_probe() is None
    assert session.on_message(chain.seal(), 1.0) == []
    assert session.next_probe() == (EVERY + 1, -5)


@pytest.mark.attack
def test_who_says_again_and_again_that_the_weights_are_wrong_gets_no_more_codes(manifest, chain):
    session, given = proven(manifest, chain, EVERY), []
    for _ in range(5):
        effects = session.on_message(Resync(session.replica.round, bytes(16)), 0.0)
        if any(isinstance(each, StartOver) for each in effects):
            session.opened(Replica(manifest, zeros(500)), 0.0)
        round = session.replica.round
        session.on_message(Welcome(PROTOCOL_VERSION, 0, manifest.encode(), round, -5, None), 0.0)
        relay = Chain(manifest)
        while relay.replica.round < round:
            relay.commit(9999)
        given += codes_given_to(session, relay)
    assert given == []


def test_the_coordinator_may_say_so_again_once_it_has_signed_something_since(manifest, chain):
    session = proven(manifest, chain, EVERY)
    for _ in range(2):
        effects = session.on_message(Resync(session.replica.round, bytes(16)), 0.0)
        assert isinstance(effects[-1], StartOver)
        session.opened(Replica(manifest, zeros(500)), 0.0)
        session.on_message(Welcome(PROTOCOL_VERSION, 0, manifest.encode(), len(chain.commits), -5, None), 0.0)
        session.on_message(History(tuple(each.encode() for each in chain.commits)), 0.0)
        session.on_message(chain.seal(), 0.0)
        for _ in range(EVERY):
            chain.commit()
        session.on_message(History(tuple(each.encode() for each in chain.commits)), 0.0)
        session.on_message(chain.seal(), 0.0)
        assert session.next_probe() == (len(chain.commits), -5)


@pytest.mark.attack
def test_a_run_does_not_end_before_its_last_round(manifest, chain):
    session = proven(manifest, chain, 2 * EVERY)
    assert says_hello(session.on_message(Finished(2 * EVERY, chain.replica.digest()), 0.0))
