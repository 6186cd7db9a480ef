"""The service with everything but sockets and the clock's pace: real files, a real ledger, real messages."""

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.archive import restore
from coordinator.config import ConfigError, ServiceConfig, check_capacity
from coordinator.history import take_back
from coordinator.rundir import RunDirectory
from coordinator.service import Service
from coordinator.status import read_status, stored_status
from transport.brevity import expanded
from transport.catchup import Download
from transport.keys import invitation_keys
from transport.messages import (
    HISTORY_BYTES,
    MAX_COORDINATOR_FRAME_BYTES,
    PROTOCOL_VERSION,
    Admitted,
    Answer,
    Audit,
    Brief,
    Fetch,
    Follow,
    Hello,
    History,
    Leave,
    Piece,
    Progress,
    Redeem,
    Refuse,
    Report,
    Resync,
    Rotate,
    Trace,
    Welcome,
    decode_from_coordinator,
    encode,
)
from transport.session import Session, StartOver, Transmit
from transport.sockets import Sent
from zo.commit import Commit, decode_entry
from zo.replica import Replica
from zo.snapshot import decode_snapshot
from zo.weights import WeightsOverflow, zeros

SIZE = 64
DIRECTIONS = 400


class Wire:
    """The coordinator's end of the wire: takes everything, and remembers it."""

    def __init__(self):
        self.sent, self.cuts = [], []

    def send(self, session, frame):
        self.sent.append((session, decode_from_coordinator(frame)))
        return Sent.OK

    def cut(self, session):
        self.cuts.append(session)


class Served:
    """A run directory that is served, stopped and served again."""

    def __init__(self, path, manifest, config=None):
        self.directory = RunDirectory(path)
        self.manifest = manifest
        self.directory.create(manifest, config or ServiceConfig(), Replica(manifest, zeros(SIZE)))
        self.keyring = self.directory.keyring()
        for node in range(4):
            self.keyring.allow(node.to_bytes(32, "big"))
        self.ledger = None
        self.start()

    def start(self):
        """As after a SIGKILL: nothing is saved that was not."""
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = self.directory.ledger(self.manifest)
        restored = restore(self.directory, self.manifest, self.ledger, lambda done, total: None)
        self.origin = restored.origin
        self.wire = Wire()
        config = self.directory.config()
        self.service = Service(
            self.directory, self.manifest, config, self.ledger, [restored], self.wire, self.keyring
        )
        self.service._save_snapshots_if_due()

    def say(self, node, message):
        """What a node is sent in answer."""
        before = len(self.wire.sent)
        frame = message if isinstance(message, bytes) else encode(message)
        self.service._handle(b"session %d" % node, node.to_bytes(32, "big"), frame)
        return [message for session, message in self.wire.sent[before:] if session == b"session %d" % node]

    def hello(self, node, round=0, **change):
        base, tokenizer = (
            bytes.fromhex(each) for each in (self.manifest.base.digest, self.manifest.base.tokenizer_digest)
        )
        head = self.ledger.head_after(round) if round <= self.ledger.num_commits() else bytes(16)
        hello = Hello(PROTOCOL_VERSION, self.manifest.run_id, base, tokenizer, round, head, f"n{node}")
        return self.say(node, msgspec.structs.replace(hello, **change))

    def play(self, rounds, node=0):
        rng = np.random.default_rng(self.service.conductors[0].round)
        for _ in range(rounds):
            codes = rng.integers(-60, 60, DIRECTIONS).astype(np.int8).tobytes()
            self.say(node, Report(self.service.conductors[0].round % 256, codes))

    def noted(self, kind):
        return [event for event in self.ledger.events() if event.kind == kind]

    def replay(self, round):
        replica = Replica(self.manifest, zeros(SIZE))
        for entry in self.ledger.entries(0, round):
            replica.apply(entry, history=self.ledger.entries)
        return replica


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(size=SIZE, directions=DIRECTIONS, rounds=1000)


@pytest.fixture
def served(tmp_path, manifest):
    served = Served(tmp_path / "run", manifest)
    served.hello(0)
    yield served
    served.ledger.close()


def test_the_status_shows_the_digest_that_was_recorded_last_and_takes_none_of_its_own(served, monkeypatch):
    served.play(5)
    monkeypatch.setattr(Replica, "digest", None)  # calling it would fail
    status = served.service._make_status()
    assert (status.round, status.digest_round) == (5, 4)
    assert status.digest == served.ledger.digest_at(4).hex()


def test_when_it_stops_the_status_shows_the_digest_of_the_end(served):
    served.play(5)
    served.service.close()
    status = served.service.status
    assert (status.digest_round, status.digest) == (5, served.replay(5).digest().hex())


def test_a_service_that_ends_with_an_overflow_says_that_it_serves_no_more(served, monkeypatch):
    def overflow(now):
        raise WeightsOverflow("too far")

    served.service._save_status()
    monkeypatch.setattr(served.wire, "receive", lambda wait: [], raising=False)
    monkeypatch.setattr(served.service.conductors, "on_tick", overflow)
    with pytest.raises(WeightsOverflow):
        served.service.run(lambda: False, False, lambda *_: None)
    assert not stored_status(served.ledger).serving


# ---- few bytes ----------------------------------------------------------------------------------------------------


def commits_to(served, session):
    return [each for to, each in served.wire.sent if to == session and isinstance(each, Commit | Brief)]


def test_a_node_that_has_the_commit_before_is_sent_only_what_is_new(served):
    served.play(3)
    whole, *short = commits_to(served, b"session 0")
    assert isinstance(whole, Commit)
    assert [type(each) for each in short] == [Brief, Brief]
    commits = list(served.ledger.entries())
    assert [whole, expanded(short[0], commits[0]), expanded(short[1], commits[1])] == commits


def test_who_comes_later_or_lost_one_is_sent_the_next_whole(served, monkeypatch):
    served.play(2)
    served.hello(1)
    served.play(1)
    assert type(commits_to(served, b"session 1")[-1]) is Commit
    assert type(commits_to(served, b"session 0")[-1]) is Brief
    with monkeypatch.context() as patch:
        patch.setattr(served.wire, "send", lambda session, frame: Sent.FULL)
        served.play(1)
    served.hello(0, round=4)
    served.play(1)
    assert type(commits_to(served, b"session 0")[-1]) is Commit


def test_a_history_travels_squeezed_and_is_counted_as_it_travels(served):
    served.play(8)
    sizes = []
    send = served.wire.send
    served.wire.send = lambda session, frame: (sizes.append(len(frame)), send(session, frame))[1]
    (_, history) = served.hello(1)
    assert sum(map(len, history.frames)) > 8 * DIRECTIONS > sizes[1]
    assert served.service.conductors[0].members[1].down.payload_bytes == sum(sizes)
    assert [decode_entry(frame) for frame in history.frames] == list(served.ledger.entries())


# ---- offers -------------------------------------------------------------------------------------------------------


def test_without_a_snapshot_nothing_is_offered(served):
    served.play(8)
    (welcome, history) = served.hello(1)
    assert welcome.offer is None
    assert len(history.frames) == 8


def test_what_fits_a_frame_or_two_is_not_worth_a_choice(served):
    served.play(20)
    served.service._save_snapshots_if_due()
    assert served.service._tracks[0].archive._newest.round == 20
    assert served.ledger.cost_since(0)[0] <= HISTORY_BYTES
    assert served.hello(1)[0].offer is None


def test_who_lacks_more_is_offered_the_newest_snapshot_with_what_both_ways_cost(served):
    served.play(160)
    served.service._save_snapshots_if_due()
    served.play(20)
    (welcome,) = served.hello(1)
    offer = welcome.offer
    frames = list(served.ledger.frames())
    assert offer.round == 160
    assert offer.can_replay
    assert (offer.replay_bytes, offer.replay_codes) == (sum(map(len, frames)), 180 * DIRECTIONS)
    assert (offer.tail_bytes, offer.tail_codes) == (sum(map(len, frames[160:])), 20 * DIRECTIONS)
    # whoever is past the snapshot, or lacks little, just gets the rest
    assert served.hello(2, round=165)[0].offer is None
    assert served.hello(2, round=159)[0].offer is None


def test_past_a_rollback_only_a_snapshot_is_offered(served):
    served.play(10)
    take_back(served.directory, served.manifest, served.ledger, 6, [])
    served.start()
    assert served.service._tracks[0].archive._newest.round == 11
    (welcome,) = served.hello(0, round=10)
    assert not welcome.offer.can_replay
    assert welcome.offer.round == 11
    (welcome, *rest) = served.hello(1, round=11)
    assert welcome.offer is None
    assert rest == []


def test_a_rollback_without_its_snapshot_gets_one_at_the_next_start(served):
    served.play(10)
    take_back(served.directory, served.manifest, served.ledger, 6, [])
    for path in served.directory.snapshots().directory.iterdir():
        path.unlink()
    served.start()
    assert served.hello(0, round=10)[0].offer.round == 11


def test_a_node_can_fetch_what_it_is_offered(served):
    served.play(200)
    served.service._save_snapshots_if_due()
    served.play(3)
    (welcome,) = served.hello(1)
    download = Download(welcome.offer.content)
    offsets = list(download.wanted())
    for offset in offsets:
        (piece,) = served.say(1, Fetch(download.content, offset))
        download.add(piece.offset, piece.num_bytes, piece.data)
        offsets += download.wanted()
    assert download.is_intact
    replica = decode_snapshot(bytes(download.data), served.manifest)
    (history,) = served.say(1, Follow(replica.round, replica.head))
    for frame in history.frames:
        replica.apply(decode_entry(frame))
    assert replica.digest() == served.service.conductors[0].replica.digest()


def test_a_snapshot_that_was_damaged_is_replaced_when_it_is_asked_for(served):
    served.play(200)
    served.service._save_snapshots_if_due()
    (welcome,) = served.hello(1)
    content = welcome.offer.content
    (path,) = served.directory.snapshots().directory.glob(f"*{content.hex()}.zo")
    path.write_bytes(path.read_bytes()[:100])
    served.play(2)
    assert served.say(1, Fetch(content, 0)) == [Piece(content, 0, 0, b"")]
    (welcome,) = served.hello(1)
    assert welcome.offer.content != content
    assert welcome.offer.round == 202
    (piece,) = served.say(1, Fetch(welcome.offer.content, 0))
    assert piece.num_bytes == welcome.offer.num_bytes


def test_asking_for_nonsense_makes_no_snapshots(served):
    served.play(200)
    served.service._save_snapshots_if_due()
    served.play(2)
    before = served.directory.snapshots().stored()
    content = served.service._tracks[0].archive._newest.content
    assert served.say(0, Fetch(content, 2**40))[0].data == b""
    assert served.say(0, Fetch(bytes(16), 0)) == [Piece(bytes(16), 0, 0, b"")]
    assert served.directory.snapshots().stored() == before


def test_snapshots_come_as_the_ledger_grows_and_a_start_uses_them(served):
    for _ in range(10):
        served.play(20)
        served.service._save_snapshots_if_due()
    stored = served.directory.snapshots().stored()
    assert 3 <= len(stored) <= 12
    served.start()
    assert served.origin == f"snapshot of round {stored[-1].round}"
    assert served.service.conductors[0].replica.digest() == served.replay(200).digest()


# ---- parity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flipped_at", "bit"), [(3, 0), (9, 31), (13, 17)])
def test_the_first_wrong_round_is_found(served, flipped_at, bit):
    """A bit flips in a session's memory; the note names the round, from the node's digests and a replay."""
    manifest = served.manifest
    session = Session(
        manifest.run_id,
        bytes.fromhex(manifest.base.digest),
        bytes.fromhex(manifest.base.tokenizer_digest),
        "n1",
        None,
    )
    served.play(1)
    to_send = [effect.message for effect in session.on_link_up()]
    seen = 0
    while not served.noted("first-difference"):
        assert served.service.conductors[0].round < 30
        for message in to_send:
            served.say(1, message)
        served.play(1)
        received = [message for to, message in served.wire.sent[seen:] if to == b"session 1"]
        seen = len(served.wire.sent)
        to_send = []
        for message in received:
            for effect in session.on_message(message, 0.0):
                if isinstance(effect, Transmit):
                    to_send.append(effect.message)
                if isinstance(effect, StartOver):
                    to_send += [e.message for e in session.opened(Replica(manifest, zeros(SIZE)), 0.0)]
            if session.replica is None:
                session.opened(Replica(manifest, zeros(SIZE)), 0.0)
            elif session.replica.round == flipped_at:
                session.replica.weights.view(np.uint32)[11] ^= np.uint32(1 << bit)
                flipped_at_round, flipped_at = flipped_at, -1
    (event,) = served.noted("first-difference")
    # the digest of that round was taken before the bit flipped
    assert (
        f"first different after {flipped_at_round + 1} commits (equal until {flipped_at_round})" in event.text
    )
    assert event.node == 1
    (diverged,) = served.noted("diverged")
    assert "told to start over" in diverged.text
    alerts = read_status(manifest, served.ledger).alerts
    assert [alert.partition(": ")[2] for alert in alerts] == [diverged.text, event.text]


def test_digests_between_are_those_of_a_replay_and_none_where_there_are_none(served):
    served.play(20)
    expected = [served.replay(round).digest() for round in range(5, 13)]
    assert served.service._tracks[0].archive.digests_between(5, 12) == expected
    assert served.service._tracks[0].archive.digests_between(20, 20) == [served.replay(20).digest()]
    assert served.service._tracks[0].archive.digests_between(0, 0) == [served.replay(0).digest()]
    for first, last in ((5, 21), (6, 5), (-1, 3)):
        assert served.service._tracks[0].archive.digests_between(first, last) == []


def test_a_trace_over_a_rollback(served):
    served.play(8)
    take_back(served.directory, served.manifest, served.ledger, 6, [])
    served.start()
    served.hello(0, round=9)
    served.play(3)
    expected = [served.replay(round).digest() for round in range(7, 12)]
    assert served.service._tracks[0].archive.digests_between(7, 11) == expected


def test_a_second_divergence_counts_over_a_restart(served):
    served.play(8)
    right = served.ledger.digest_at(8)
    assert served.say(0, Progress(8, bytes(16), None)) == [Resync(8, right)]
    served.hello(0)
    served.start()
    assert served.service.status.members[0].divergences == 1
    served.hello(0)
    served.say(0, Progress(4, bytes(16), None))
    assert served.service._roster.is_quarantined(0)
    served.start()
    (refusal,) = served.hello(0)
    assert isinstance(refusal, Refuse)
    assert refusal.cause == "quarantined"
    # released, it has a clean slate
    served.ledger.set_quarantined(0, False)
    served.ledger.note(8, "released", 0, "node 0 may join again")
    served.start()
    assert isinstance(served.hello(0)[0], Welcome)
    served.say(0, Progress(4, bytes(16), None))
    assert not served.service._roster.is_quarantined(0)


def test_a_restart_between_a_fault_and_its_mending_makes_no_second_fault(served):
    served.play(8)
    served.say(0, Progress(8, bytes(16), None))
    served.start()  # before the node has heard of it
    served.hello(0, round=8)
    served.say(0, Progress(8, bytes(16), None))
    assert not served.service._roster.is_quarantined(0)
    assert len(served.noted("diverged")) == 1


# ---- what a peer can make it write ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["malformed", "misfit", "refused"])
def test_a_peer_cannot_fill_the_ledger_with_events(served, kind):
    for _ in range(100):
        if kind == "malformed":
            served.say(0, b"\x00")
        elif kind == "misfit":
            served.say(0, Report(0, b"\x01"))
        else:
            served.hello(1, protocol=9)
    found = served.noted(kind)
    assert len(found) == 16
    assert found[-1].text.endswith("(further ones are not noted until the next start)")
    assert not any("further ones" in event.text for event in found[:-1])
    served.start()
    served.say(0, b"\x00") if kind == "malformed" else served.hello(1, protocol=9)
    assert len(served.noted(kind)) == (17 if kind != "misfit" else 16)


def test_coming_and_going_is_noted_often_but_not_without_bound(served, monkeypatch):
    monkeypatch.setattr("coordinator.service._NOTED_OF_A_NODE", {"joined": 5, "lost": 5})
    for _ in range(10):
        served.hello(1)
        served.service._carry_out(served.service.conductors.on_unsent(b"session 1", 0.0))
    assert len(served.noted("joined")) == 1 + 5  # node 0 once, node 1 as often as is allowed
    assert len(served.noted("lost")) == 5
    served.hello(2)
    assert len(served.noted("joined")) == 7  # what one node does is no loss for another


def test_malformed_frames_are_counted_beyond_what_is_noted(served):
    for _ in range(100):
        served.say(0, b"\x00")
    served.service._save_status()
    assert served.service.status.malformed_frames == 100


# ---- the status -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored", [b"{}", b'{"run": "x", "members": []}', b"[]", b"\xff", b'{"round": "many"}']
)
def test_a_status_of_another_version_is_ignored(served, stored):
    served.play(3)
    served.ledger.set_status(stored)
    assert stored_status(served.ledger) is None
    assert read_status(served.manifest, served.ledger).round == 3
    served.start()
    assert served.service.status.round == 3
    assert [member.name for member in served.service.status.members] == ["n0"]


def test_byte_counts_go_on_over_a_restart(served):
    served.play(3)
    served.service._save_status()
    before = served.service.status.members[0].payload_bytes_up
    assert before > 3 * DIRECTIONS
    served.start()
    assert served.service.status.members[0].payload_bytes_up == before


# ---- the largest commit ---------------------------------------------------------------------------------------------


def test_a_quorum_that_can_never_come_together_is_refused(make_manifest):
    with pytest.raises(ConfigError, match="quorum = 9 and capacity = 8"):
        check_capacity(ServiceConfig(quorum=9, capacity=8), make_manifest())


@pytest.mark.parametrize("directions", [1, 16, 1000, 4096])
def test_the_largest_commit_that_is_allowed_fits_a_frame(make_manifest, directions):
    manifest = make_manifest(directions=directions, rounds=10, staleness=1)
    most = 4096
    while True:
        try:
            check_capacity(ServiceConfig(capacity=most), manifest)
            break
        except ConfigError as error:
            most = int(str(error).rsplit(" ", 1)[1])
    nodes = tuple(range(2**32 - 257 - most, 2**32 - 257))
    commit = Commit(2**40, (2**31 - 1,), (-64,), nodes, bytes(most * directions), bytes(16), nodes)
    frame = encode(History((commit.encode(),)))
    assert len(frame) <= MAX_COORDINATOR_FRAME_BYTES
    assert most == 4096 or len(frame) > 0.99 * MAX_COORDINATOR_FRAME_BYTES
    decode_from_coordinator(frame)


def test_a_trace_has_room_in_a_nodes_frame():
    assert len(encode(Trace(2**40, (bytes(16),) * 128))) < 8 * 1024


# ---- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.attack
@pytest.mark.parametrize("junk", [b"", b"junk", bytes(8192), encode(Leave()), encode(Fetch(bytes(16), 0))])
def test_a_member_that_floods_is_cut_off_and_changes_nothing(served, junk):
    served.hello(1)
    served.play(2)
    frames = list(served.ledger.frames())
    for _ in range(1500):
        served.say(1, junk)
    assert served.wire.cuts[0] == b"session 1"
    assert len(served.wire.cuts) > 400
    (event, *more) = served.noted("flooded")
    assert event.text.endswith("sends more than it is asked for: its connection is cut")
    assert len(more) < 16
    assert list(served.ledger.frames()) == frames
    served.play(1)
    assert served.service.conductors[0].round == 3


@pytest.mark.attack
def test_hello_without_end_is_cut_off(served):
    answers = [len(served.hello(1)) for _ in range(200)]
    assert answers[:100] == [1] * 100
    assert 0 in answers[100:]
    assert served.noted("flooded")[0].text == "node 1 (n1) says hello without end: its connection is cut"


# ---- who may join -------------------------------------------------------------------------------------------------

TOKEN = bytes(range(50, 66))
DOOR, NEW, RUN_ID = invitation_keys(TOKEN).public, b"n" * 32, bytes(16)


def speak(served, key, message, session=b"new"):
    """What a key is told over a connection of its own."""
    before = len(served.wire.sent)
    served.service._handle(session, key, encode(message))
    return [message for to, message in served.wire.sent[before:] if to == session]


def greet(served, key, session=b"new"):
    base, tokenizer = (
        bytes.fromhex(each) for each in (served.manifest.base.digest, served.manifest.base.tokenizer_digest)
    )
    run = served.manifest.run_id
    return speak(served, key, Hello(PROTOCOL_VERSION, run, base, tokenizer, 0, run, "new"), session)


def test_a_token_lets_one_key_in_and_is_durable_before_it_is_said(served):
    served.keyring.invite(DOOR, uses=1)
    run = served.manifest.run_id
    with served.directory.keyring() as on_disk:
        assert speak(served, DOOR, Redeem(run, NEW)) == [Admitted(NEW)]
        on_disk.refresh()
        assert on_disk.passes(NEW)
        assert on_disk.standing(DOOR).invitation.uses_left == 0
    assert speak(served, DOOR, Redeem(run, NEW)) == [
        Admitted(NEW)
    ]  # the answer was lost: it costs no other use
    assert isinstance(greet(served, NEW)[0], Welcome)
    assert served.noted("admitted")[0].text == f"invitation 2 let the key {NEW.hex()} in"


@pytest.mark.attack
def test_a_token_that_is_used_up_or_expired_or_of_another_run_lets_nobody_in(served):
    served.keyring.invite(DOOR, uses=1)
    run = served.manifest.run_id
    assert speak(served, DOOR, Redeem(RUN_ID, NEW))[0].cause == "run"
    assert speak(served, DOOR, Redeem(run, NEW)) == [Admitted(NEW)]
    other = b"o" * 32
    (refuse,) = speak(served, DOOR, Redeem(run, other))
    assert "used up" in refuse.reason
    expired = b"e" * 32
    served.keyring.invite(expired, uses=1, expires_at=1.0)
    assert "has expired" in speak(served, expired, Redeem(run, other))[0].reason
    assert not served.keyring.passes(other)


@pytest.mark.attack
def test_what_is_taken_back_while_a_node_asks_is_refused_as_if_it_had_been_before(served):
    door = served.keyring.invite(DOOR)
    with served.directory.keyring() as another_process:
        another_process.withdraw(door.number)
        another_process.revoke((0).to_bytes(32, "big"))
        another_process.allow(NEW)
    run = served.manifest.run_id
    (refuse,) = speak(served, DOOR, Redeem(run, b"o" * 32))
    assert "was withdrawn" in refuse.reason
    assert speak(served, (0).to_bytes(32, "big"), Rotate(b"p" * 32))[0].cause == "revoked"
    assert speak(served, DOOR, Redeem(run, NEW)) == [Admitted(NEW)]  # a person has let it in meanwhile
    assert not served.noted("admitted")


@pytest.mark.attack
def test_the_key_of_an_invitation_can_do_nothing_else(served):
    served.keyring.invite(DOOR)
    for message in (Report(0, bytes(DIRECTIONS)), Leave(), Rotate(NEW)):
        (refuse,) = speak(served, DOOR, message)
        assert refuse.cause == "invitation"
    assert greet(served, DOOR)[0].cause == "invitation"
    assert len(served.ledger.members()) == 1
    served.service._to_cut[0] = (0.0, b"new")
    served.service._enforce()
    assert served.wire.cuts == [b"new"]


@pytest.mark.attack
def test_a_key_revoked_in_the_middle_of_a_round_is_out_of_that_round(tmp_path, manifest):
    served = Served(tmp_path / "run", manifest, ServiceConfig(quorum=2))
    for node in range(3):
        served.hello(node)
    for node in range(3):  # all three are live and awaited from now on
        served.say(node, Report(0, bytes(DIRECTIONS)))
    round = served.service.conductors[0].round
    served.say(2, Report(round % 256, b"\x7f" * DIRECTIONS))
    served.say(0, Report(round % 256, bytes(DIRECTIONS)))
    assert served.service.conductors[0].round == round
    with served.directory.keyring() as another_process:
        another_process.revoke((2).to_bytes(32, "big"))
    before = len(served.wire.sent)
    served.service._enforce()
    ((session, refuse),) = served.wire.sent[before:]
    assert (session, refuse.cause) == (b"session 2", "revoked")
    served.say(1, Report(round % 256, bytes(DIRECTIONS)))
    assert served.service.conductors[0].round == round + 1
    commit = decode_entry(list(served.ledger.frames())[-1])
    assert commit.participants == (0, 1)
    assert served.noted("left")[-1].text.startswith("node 2 (n2) was shut out: this node's key was revoked")
    assert served.say(2, Report((round + 1) % 256, bytes(DIRECTIONS)))[0].cause == "revoked"
    assert served.hello(2)[0].cause == "revoked"
    served.ledger.close()


@pytest.mark.attack
def test_a_key_that_is_revoked_while_its_node_is_away_is_out_of_that_round(tmp_path, manifest):
    served = Served(tmp_path / "run", manifest, ServiceConfig(quorum=2))
    for node in range(3):
        served.hello(node)
    for node in range(3):
        served.say(node, Report(0, bytes(DIRECTIONS)))
    round = served.service.conductors[0].round
    served.say(2, Report(round % 256, b"\x7f" * DIRECTIONS))
    served.say(2, Leave())
    with served.directory.keyring() as another_process:
        another_process.revoke((2).to_bytes(32, "big"))
    served.service._enforce()
    for node in range(2):
        served.say(node, Report(round % 256, bytes(DIRECTIONS)))
    assert decode_entry(list(served.ledger.frames())[round]).participants == (0, 1)
    served.ledger.close()


def test_a_node_keeps_its_number_when_it_changes_its_key(served):
    served.play(1)
    old = (0).to_bytes(32, "big")
    assert speak(served, old, Rotate(NEW)) == [Admitted(NEW)]
    (welcome, *_) = greet(served, NEW)
    assert welcome.node == 0
    assert speak(served, NEW, Rotate(NEW), b"again") == [Admitted(NEW)]
    assert served.hello(0)[0].reason == "this node has another key now: this one was rotated out"
    assert len(served.ledger.members()) == 1
    served.start()
    assert greet(served, NEW)[0].node == 0


@pytest.mark.attack
def test_nobody_takes_the_key_of_another_node(served):
    assert speak(served, (0).to_bytes(32, "big"), Rotate((1).to_bytes(32, "big")))[0].cause == "key"
    assert greet(served, (1).to_bytes(32, "big"))[0].node == 1


def test_a_key_may_train_only_the_agents_of_its_invitation(served):
    served.keyring.allow(NEW, frozenset({1}))
    (refuse,) = greet(served, NEW)
    assert refuse.reason == "this node's key may train the agents 1, not 0"


@pytest.mark.attack
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(messages=st.lists(st.tuples(st.booleans(), st.binary(max_size=1), st.booleans()), max_size=20))
def test_words_about_keys_change_no_more_than_one_key(served, messages):
    known = {record.key for record in served.keyring.records()}
    for is_redeem, byte, is_member in messages:
        key = byte.ljust(32, b"x")
        message = Redeem(served.manifest.run_id, key) if is_redeem else Rotate(key)
        speaker = (0).to_bytes(32, "big") if is_member else b"stranger".ljust(32)
        (answer,) = speak(served, speaker, message)
        assert isinstance(answer, Admitted) <= (is_member and not is_redeem)
    identities = {record.identity for record in served.keyring.records()}
    assert identities <= known


# ---- influence ----------------------------------------------------------------------------------------------------


def play_with_mallory(served, rounds):
    """Nodes 0 to 2 report what is usual, node 3 the largest codes of one sign."""
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        round = served.service.conductors[0].round
        for node in range(3):
            served.say(node, Report(round % 256, rng.integers(-60, 60, DIRECTIONS).astype(np.int8).tobytes()))
        served.say(3, Report(round % 256, b"\x7f" * DIRECTIONS))
        served.service._enforce()


@pytest.fixture
def swarm_of_four(tmp_path, manifest):
    def make(**config):
        served = Served(tmp_path / "run", manifest, ServiceConfig(quorum=3, **config))
        for node in range(4):
            served.hello(node)
        return served

    return make


@pytest.mark.attack
def test_a_node_whose_codes_are_out_of_line_is_reported_once(swarm_of_four):
    served = swarm_of_four()
    play_with_mallory(served, 8)
    texts = [event.text for event in served.noted("out-of-line")]
    assert len(texts) == 2
    assert all(text.startswith("node 3 (n3): ") for text in texts)
    assert any("codes are at ±127" in text for text in texts)
    assert any("node 3 (n3)" in alert for alert in read_status(served.manifest, served.ledger).alerts)
    assert 3 in decode_entry(list(served.ledger.frames())[-1]).participants
    served.ledger.close()


@pytest.mark.attack
def test_a_node_whose_codes_are_out_of_line_is_shut_out_if_that_is_the_policy(swarm_of_four):
    served = swarm_of_four(quarantine_out_of_line=True)
    play_with_mallory(served, 8)
    assert len(served.noted("out-of-line")) == 2
    assert 3 not in decode_entry(list(served.ledger.frames())[-1]).participants
    refused = [m for session, m in served.wire.sent if session == b"session 3" and isinstance(m, Refuse)]
    assert refused[0].cause == "quarantined"
    assert "node 3 is out of line: 4" in refused[0].reason
    assert served.hello(3)[0].cause == "quarantined"
    served.start()
    assert served.hello(3)[0].cause == "quarantined"
    served.ledger.close()


def play_audited(served, rounds):
    """Every round is audited; node 3 reports as all do, and tells losses of another model."""
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        round = served.service.conductors[0].round
        for node in range(4):
            losses = np.array([9.0, 9.0] if node == 3 else [4.5, 4.25], "<f4").tobytes()
            served.say(node, Answer(round, losses))
            served.say(node, Report(round % 256, rng.integers(-60, 60, DIRECTIONS).astype(np.int8).tobytes()))
        served.service._enforce()


@pytest.mark.attack
@pytest.mark.parametrize("is_shut_out", [False, True])
def test_a_node_whose_answers_are_far_is_shut_out_if_that_is_the_policy(tmp_path, make_manifest, is_shut_out):
    manifest = make_manifest(size=SIZE, directions=DIRECTIONS, rounds=1000, rows=("{}",))
    config = ServiceConfig(quorum=3, audit_every=1, quarantine_out_of_line=is_shut_out)
    served = Served(tmp_path / "run", manifest, config)
    for node in range(4):
        served.hello(node)
    play_audited(served, 8)
    (event,) = served.noted("out-of-line")
    assert event.text == "node 3 (n3): 4 of its 4 answers to public audits are far from the other nodes'"
    assert any("node 3 (n3)" in alert for alert in read_status(served.manifest, served.ledger).alerts)
    assert (3 in decode_entry(list(served.ledger.frames())[-1]).participants) is not is_shut_out
    if is_shut_out:
        assert served.hello(3)[0].cause == "quarantined"
    served.ledger.close()


def test_without_public_rows_nobody_is_asked(swarm_of_four):
    served = swarm_of_four(audit_every=1)
    play_audited(served, 3)
    assert not any(isinstance(message, Audit) for _, message in served.wire.sent)
    served.ledger.close()
