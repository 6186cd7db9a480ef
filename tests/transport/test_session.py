"""A node's session: every arrow between its stages, and every message in each of them."""

import msgspec
import numpy as np
import pytest

from transport.brevity import brief
from transport.catchup import Download
from transport.exits import Exit
from transport.messages import (
    PIECE_BYTES,
    PROTOCOL_VERSION,
    Commit,
    Fetch,
    Finished,
    Follow,
    Hello,
    History,
    Identify,
    Leave,
    Offer,
    Piece,
    Progress,
    Refuse,
    Report,
    Resync,
    Trace,
    Welcome,
)
from transport.session import (
    GREET_S,
    RESEND_S,
    Applied,
    End,
    Jumped,
    Keep,
    Open,
    Session,
    Stage,
    StartOver,
    Transmit,
)
from zo.codes import NO_VOTE
from zo.directions import GROUP_0, SHARED
from zo.replica import Replica
from zo.snapshot import content_address, encode_snapshot
from zo.weights import zeros

BASE, TOKENIZER = b"\xb0" * 16, b"\x70" * 16
OFFER = Offer(b"\xcc" * 16, 3, 500, 0, 0, 10**6, 10**6, True)
CODES = np.array([3, -4], np.int8)


class Rig:
    """A session, a manifest, and the replica of a node that never fails."""

    def __init__(self, manifest, replica=None, **options):
        self.manifest = manifest
        saved = (manifest, replica) if replica else None
        self.session = Session(manifest.run_id, BASE, TOKENIZER, "n", saved, **options)
        self.truth = Replica(manifest, zeros(500))
        self.commits = []

    def fresh(self):
        return Replica(self.manifest, zeros(500))

    def commit(self, participants=(0, 1), step=1000):
        """The next commit of the run."""
        codes = bytes(range(1, 1 + 2 * len(participants)))
        commit = Commit(len(self.commits), (step,), (-5,), participants, codes, self.truth.head)
        self.truth.apply(commit)
        self.commits.append(commit)
        return commit

    def welcome(self, round=None, exponent=-4, node=0):
        number = len(self.commits) if round is None else round
        return Welcome(PROTOCOL_VERSION, node, self.manifest.encode(), number, exponent, None)

    def hello(self):
        replica = self.session.replica
        round, head = (replica.round, replica.head) if replica else (0, self.manifest.run_id)
        return Transmit(Hello(PROTOCOL_VERSION, self.manifest.run_id, BASE, TOKENIZER, round, head, "n"))

    def get(self, message, now=0.0):
        return self.session.on_message(message, now)

    def in_stage(self, stage):
        """Bring the session there."""
        session = self.session
        if stage is not Stage.CONNECTING:
            session.on_link_up()
        if stage is Stage.FETCHING:
            self.get(msgspec.structs.replace(self.welcome(), offer=OFFER))
            session.opened(self.fresh(), 0.0)
        if stage in (Stage.FOLLOWING, Stage.REPORTED):
            self.get(self.welcome())
            session.opened(self.fresh(), 0.0)
        if stage is Stage.REPORTED:
            session.on_probed(0, CODES, 1.0, 0.0)
        if stage is Stage.ENDED:
            self.get(Refuse("full", "no room"))
        assert session.stage is stage
        return self


@pytest.fixture
def rig(make_manifest):
    return Rig(make_manifest())


@pytest.fixture
def following(rig):
    return rig.in_stage(Stage.FOLLOWING)


@pytest.fixture
def reported(rig):
    return rig.in_stage(Stage.REPORTED)


# ---- arrows between stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.ENDED])
def test_a_connection_that_comes_up_is_greeted(rig, stage):
    rig.in_stage(stage)
    assert rig.session.on_link_up() == [rig.hello()]
    assert rig.session.stage is Stage.GREETING


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.ENDED])
def test_a_connection_that_goes_down_is_waited_for(rig, stage):
    rig.in_stage(stage).session.on_link_down()
    assert rig.session.stage is Stage.CONNECTING
    assert rig.session.next_probe() is None


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.ENDED])
@pytest.mark.parametrize(
    ("cause", "code"),
    [("full", Exit.REFUSED), ("base", Exit.BASE), ("tokenizer", Exit.BASE), ("fork", Exit.REFUSED)],
)
def test_a_refusal_ends_it_in_any_stage(rig, stage, cause, code):
    assert rig.in_stage(stage).get(Refuse(cause, "because")) == [End(code, "because")]
    assert rig.session.stage is Stage.ENDED


def test_once_ended_nothing_happens_any_more(rig):
    session = rig.in_stage(Stage.ENDED).session
    assert session.on_link_up() == []
    session.on_link_down()
    for message in (rig.welcome(), Identify(), rig.commit(), Finished(0, bytes(16)), Refuse("x", "y")):
        assert rig.get(message) == []
    assert session.on_tick(1e9) == []
    assert session.opened(rig.fresh(), 0.0) == []
    assert session.leave() == []
    assert session.next_probe() is None
    assert session.stage is Stage.ENDED


def test_the_first_welcome_opens_the_run_then_there_is_a_probe(rig):
    session = rig.in_stage(Stage.GREETING).session
    assert rig.get(rig.welcome(node=7)) == [Open(rig.manifest)]
    assert session.stage is Stage.FOLLOWING
    assert session.node == 7
    assert session.next_probe() is None  # there are no weights yet
    assert session.opened(rig.fresh(), 0.0) == []
    assert session.next_probe() == (0, -4)


def test_a_probe_becomes_a_report(following):
    session = following.session
    effects = session.on_probed(0, CODES, 2.5, 0.0)
    assert effects == [Transmit(Report(0, b"\x03\xfc"))]
    assert session.stage is Stage.REPORTED
    assert session.loss == 2.5
    assert session.next_probe() is None


def test_the_commit_of_the_round_ends_the_waiting(reported):
    commit = reported.commit()
    assert reported.get(commit) == [Applied(commit, own_codes=True, was_late=False)]
    assert reported.session.stage is Stage.FOLLOWING
    assert reported.session.next_probe() == (1, -5)
    assert reported.session.replica.digest() == reported.truth.digest()


def test_a_commit_without_the_own_codes_says_that_they_came_too_late(reported):
    commit = reported.commit(participants=(1,))
    assert reported.get(commit) == [Applied(commit, own_codes=False, was_late=True)]
    assert reported.session.stage is Stage.FOLLOWING


def test_a_commit_for_which_nothing_was_reported_is_just_followed(following):
    commit = following.commit(participants=(1,))
    assert following.get(commit) == [Applied(commit, own_codes=False, was_late=False)]
    assert following.session.on_probed(0, CODES, 1.0, 0.0) == []  # the probe of a round that closed meanwhile
    assert following.session.next_probe() == (1, -5)


def test_at_the_end_it_proves_its_digest_and_leaves(make_manifest):
    rig = Rig(make_manifest(rounds=1)).in_stage(Stage.REPORTED)
    rig.get(rig.commit())
    assert rig.session.next_probe() is None
    digest = rig.truth.digest()
    progress, leave, end = rig.get(Finished(1, digest))
    assert progress == Transmit(Progress(1, digest, 1000))
    assert leave == Transmit(Leave())
    assert end.code is Exit.OK
    assert digest.hex() in end.reason
    assert rig.session.stage is Stage.ENDED


def test_leaving(rig, make_manifest):
    for stage in Stage:
        rig = Rig(make_manifest()).in_stage(stage)
        connected = stage in (Stage.FETCHING, Stage.FOLLOWING, Stage.REPORTED)
        assert rig.session.leave() == ([Transmit(Leave())] if connected else [])
        assert rig.session.stage is Stage.ENDED


# ---- messages that do not fit the stage ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.CONNECTING, Stage.GREETING])
def test_before_the_welcome_only_welcome_and_refusal_count(rig, stage):
    rig.in_stage(stage)
    for message in (rig.commit(), History((b"x",)), Resync(1, bytes(16)), Finished(0, bytes(16)), Identify()):
        assert rig.get(message) == []
        assert rig.session.stage is stage


def test_a_welcome_of_a_connection_that_broke_is_ignored(rig):
    assert rig.in_stage(Stage.CONNECTING).get(rig.welcome()) == []
    assert rig.session.stage is Stage.CONNECTING


def test_while_the_run_is_being_opened_commits_wait_for_a_hello(rig):
    rig.in_stage(Stage.GREETING).get(rig.welcome())
    assert rig.get(rig.commit()) == []
    assert rig.session.opened(rig.fresh(), 0.0) == []


# ---- following ----------------------------------------------------------------------------------------------------


def test_a_brief_commit_is_the_whole_one_after_the_one_before(following):
    first, second = following.commit(), following.commit(step=7)
    following.get(first)
    short = brief(first, second)
    assert following.get(short) == [Applied(second, own_codes=True, was_late=False)]
    assert following.session.replica.digest() == following.truth.digest()


def test_a_brief_commit_may_refer_to_one_that_came_while_it_was_not_wanted(rig):
    rig.in_stage(Stage.GREETING)
    first, second = rig.commit(), rig.commit()
    assert rig.get(first) == []  # a `Hello` is on its way: the answer will have it
    rig.get(rig.welcome(round=1))
    rig.session.opened(rig.fresh(), 0.0)
    rig.get(History((first.encode(),)))
    assert rig.get(brief(first, second)) == [Applied(second, own_codes=True, was_late=False)]


@pytest.mark.parametrize("stage", [Stage.CONNECTING, Stage.GREETING, Stage.FOLLOWING, Stage.REPORTED])
def test_a_brief_commit_that_cannot_be_made_whole_is_asked_for(rig, stage):
    rig.in_stage(stage)
    short = brief(rig.commit(), rig.commit())
    asks = [rig.hello()] if stage in (Stage.FOLLOWING, Stage.REPORTED) else []
    assert rig.get(short) == asks
    assert rig.session.stage is (Stage.GREETING if asks else stage)


def test_history_is_followed_with_progress_at_every_digest_round(rig):
    commits = [rig.commit() for _ in range(9)]
    rig.in_stage(Stage.GREETING).get(rig.welcome())
    rig.session.opened(rig.fresh(), 0.0)
    assert rig.session.behind == 9
    assert rig.session.next_probe() is None
    effects = rig.get(History(tuple(commit.encode() for commit in commits)))
    assert [e.commit for e in effects if isinstance(e, Applied)] == commits
    sent = [e.message for e in effects if isinstance(e, Transmit)]
    assert [message.round for message in sent] == [4, 8]
    assert rig.session.behind == 0
    assert rig.session.next_probe() == (9, -5)
    assert rig.session.replica.digest() == rig.truth.digest()


def test_what_was_seen_before_is_skipped(following):
    commits = [following.commit() for _ in range(3)]
    frames = tuple(commit.encode() for commit in commits)
    following.get(History(frames[:2]))
    assert [e.commit.round for e in following.get(History(frames))] == [2]
    assert following.get(commits[0]) == []
    assert following.session.replica.digest() == following.truth.digest()


def test_a_gap_is_answered_with_where_it_stands(following):
    following.commit()
    second = following.commit()
    assert following.get(second) == [following.hello()]
    assert following.session.stage is Stage.GREETING
    assert following.session.replica.round == 0
    # what follows on the heels of the gap has its answer on the way
    assert following.get(following.commit()) == []
    following.get(following.welcome())
    following.get(History(tuple(commit.encode() for commit in following.commits)))
    assert following.session.replica.digest() == following.truth.digest()


def test_history_that_is_none_ends_it(following):
    (end,) = following.get(History((b"\x00",)))
    assert end.code is Exit.DAMAGED
    assert following.session.stage is Stage.ENDED


def test_a_commit_of_another_chain_ends_it(following):
    commit = msgspec.structs.replace(following.commit(), previous=bytes(16))
    (end,) = following.get(commit)
    assert end.code is Exit.DAMAGED
    assert "follows" in end.reason
    assert following.session.replica.round == 0


def test_a_commit_that_would_overflow_ends_it_and_changes_nothing(following):
    commits = []
    for number in range(9):
        commits.append(Commit(number, (2**31 - 1,), (0,), (0,), b"\x7f\x7f", following.session.replica.head))
        effects = following.get(commits[-1])
        if isinstance(effects[-1], End):
            break
    assert effects[-1].code is Exit.DAMAGED
    assert "leave ±8" in effects[-1].reason
    assert following.session.replica.round == number


# ---- reports ------------------------------------------------------------------------------------------------------


def test_a_report_is_sent_again_after_silence_ever_more_rarely(reported):
    session = reported.session
    assert session.on_tick(RESEND_S - 0.1) == []
    times, now = [], 0.0
    while now < 300:
        now += 1.0
        if session.on_tick(now):
            times.append(now)
    assert times == [10, 30, 70, 130, 190, 250]
    reported.get(reported.commit(), now)
    session.on_probed(1, CODES, 1.0, now)
    assert session.on_tick(now + RESEND_S) == [Transmit(Report(1, b"\x03\xfc"))]


def test_a_walk_follows_the_last_commit_and_the_schedule_where_there_is_none(make_manifest):
    rig = Rig(make_manifest(directions=2, local_steps=2, decay="constant")).in_stage(Stage.REPORTED)
    by_schedule = round(0.02 * 2**28) * 8
    assert rig.session.walk_step(0, -4) == by_schedule
    rig.get(rig.commit(step=1000))  # of four votes, one of which would have been a whole step
    # Its codes were in units of 2^-4, the next are in 2^-5.
    assert rig.session.walk_step(1, -5) == 4000 // 2
    late = Rig(make_manifest(directions=2, local_steps=2, decay="constant"), rig.fresh())
    late.session.on_link_up()
    late.get(late.welcome())
    assert late.session.walk_step(0, -4) == by_schedule


@pytest.mark.parametrize(("bits", "packed"), [(4, b"\x81"), (1, b"\x01\x02")])
def test_a_report_is_packed_as_the_manifest_says(make_manifest, bits, packed):
    rig = Rig(make_manifest(bits=bits))
    rig.session.on_link_up()
    rig.get(rig.welcome())
    rig.session.opened(rig.fresh(), 0.0)
    codes = np.array([32 if bits == 1 else 12, NO_VOTE], np.int8)
    assert rig.session.on_probed(0, codes, 1.0, 0.0) == [Transmit(Report(0, packed))]


def test_an_estimator_that_is_chosen_is_said_once_and_on_every_connection(rig):
    rig.in_stage(Stage.FOLLOWING)
    hello = msgspec.structs.replace(rig.hello().message, estimator="backward")
    assert rig.session.declare("backward") == [Transmit(hello)]
    assert rig.session.stage is Stage.GREETING
    assert rig.session.declare("backward") == []
    rig.get(rig.welcome())
    rig.session.on_link_down()
    assert rig.session.on_link_up() == [Transmit(hello)]
    rig.session.on_link_down()
    assert rig.session.declare("") == []  # said when there is a connection
    assert rig.session.on_link_up() == [rig.hello()]


@pytest.mark.parametrize(("policy", "voice"), [("shared", SHARED), ("groups", GROUP_0 + 2)])
def test_combined_codes_do_not_tell_whose_they_are(make_manifest, policy, voice):
    """Whoever reported in time may take it that its codes count: nothing is sent again, nothing called late."""
    rig = Rig(make_manifest(policy=policy, groups=3 if policy == "groups" else 1))
    rig.session.on_link_up()
    rig.get(rig.welcome(node=5))
    rig.session.opened(rig.fresh(), 0.0)
    rig.session.on_probed(0, CODES, 1.0, 0.0)
    commit = rig.commit(participants=(voice,))
    assert rig.get(commit) == [Applied(commit, own_codes=True, was_late=False)]
    missed = rig.commit(participants=(voice,))
    assert rig.get(missed) == [Applied(missed, own_codes=False, was_late=False)]


def test_a_commit_of_other_groups_than_the_nodes_came_too_early_for_it(make_manifest):
    rig = Rig(make_manifest(policy="groups", groups=3))
    rig.session.on_link_up()
    rig.get(rig.welcome(node=5))
    rig.session.opened(rig.fresh(), 0.0)
    rig.session.on_probed(0, CODES, 1.0, 0.0)
    commit = rig.commit(participants=(GROUP_0, GROUP_0 + 1))
    assert rig.get(commit) == [Applied(commit, own_codes=False, was_late=True)]


def test_a_commit_with_participants_that_the_policy_does_not_have_ends_the_node(following):
    commit = msgspec.structs.replace(following.commit(), participants=(0, SHARED))
    (end,) = following.get(commit)
    assert end.code is Exit.DAMAGED
    assert "everyone is no participant of a run with policy = 'private'" in end.reason


def test_who_moves_takes_the_exponent_of_moves(make_manifest):
    rig = Rig(make_manifest(projections=3)).in_stage(Stage.FOLLOWING)
    rig.session.declare("moves")
    rig.get(rig.welcome(exponent=-7))
    assert rig.session.next_probe() == (0, -7)
    codes = np.array([1, 2, 3], np.int8)
    assert rig.session.on_probed(0, codes, 1.0, 0.0) == [Transmit(Report(0, codes.tobytes()))]
    commit = Commit(0, (5, 6), (-3, -9), (0, 1), bytes(5), rig.truth.head, (), (1,))
    rig.get(commit)
    assert rig.session.next_probe() == (1, -9)


def test_a_report_is_sent_again_on_a_new_connection(reported):
    session = reported.session
    session.on_link_down()
    session.on_link_up()
    assert session.next_probe() is None
    assert reported.get(reported.welcome()) == [Transmit(Report(0, b"\x03\xfc"))]
    assert session.stage is Stage.REPORTED


def test_a_report_that_counted_while_away_is_not_sent_again(reported):
    session = reported.session
    session.on_link_down()
    commit = reported.commit()
    session.on_link_up()
    assert reported.get(reported.welcome()) == []
    assert session.next_probe() is None
    assert reported.get(History((commit.encode(),))) == [Applied(commit, own_codes=True, was_late=False)]
    assert session.next_probe() == (1, -5)


def test_a_probe_that_ends_without_a_connection_is_reported_with_the_next(following):
    session = following.session
    session.on_link_down()
    assert session.on_probed(0, CODES, 1.0, 0.0) == []
    session.on_link_up()
    assert session.on_probed(0, CODES, 1.0, 0.0) == []
    assert following.get(following.welcome()) == [Transmit(Report(0, b"\x03\xfc"))]


def test_an_identify_is_answered_with_hello_and_the_report_follows_the_welcome(reported):
    assert reported.get(Identify()) == [reported.hello()]
    assert reported.get(Identify()) == []  # several frames were on their way: one hello is enough
    assert reported.get(reported.welcome()) == [Transmit(Report(0, b"\x03\xfc"))]


def test_the_round_of_a_report_is_sent_modulo_256(make_manifest):
    rig = Rig(make_manifest(rounds=1000))
    for _ in range(300):
        rig.commit()
    rig.in_stage(Stage.GREETING).get(rig.welcome())
    rig.session.opened(rig.fresh(), 0.0)
    rig.get(History(tuple(commit.encode() for commit in rig.commits)))
    assert rig.session.on_probed(300, CODES, 1.0, 0.0) == [Transmit(Report(44, b"\x03\xfc"))]


# ---- losses -------------------------------------------------------------------------------------------------------


def test_the_loss_is_a_running_mean_of_finite_ones(following):
    session = following.session
    session.on_probed(99, CODES, 2.0, 0.0)
    session.on_probed(99, CODES, float("nan"), 0.0)
    session.on_probed(99, CODES, float("inf"), 0.0)
    assert session.loss == 2.0
    session.on_probed(99, CODES, 3.0, 0.0)
    assert session.loss == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("share", "loss", "sent"), [(True, 1.2345, 1234), (True, -1.0, 0), (False, 1.0, None)]
)
def test_the_loss_is_shared_only_if_the_manifest_says_so(make_manifest, share, loss, sent):
    rig = Rig(make_manifest(share_loss=share, digest_every=1)).in_stage(Stage.FOLLOWING)
    rig.session.on_probed(0, CODES, loss, 0.0)
    effects = rig.get(rig.commit())
    assert effects[-1] == Transmit(Progress(1, rig.truth.digest(), sent))


def test_a_node_may_keep_its_loss_to_itself(make_manifest):
    rig = Rig(make_manifest(digest_every=1), shares_loss=False).in_stage(Stage.FOLLOWING)
    rig.session.on_probed(0, CODES, 1.0, 0.0)
    assert rig.get(rig.commit())[-1].message.loss_milli is None
    assert rig.session.loss == 1.0, "it may look at it"


def test_without_a_loss_none_is_shared(make_manifest):
    rig = Rig(make_manifest(digest_every=1)).in_stage(Stage.FOLLOWING)
    assert rig.get(rig.commit())[-1].message.loss_milli is None


# ---- starting over ------------------------------------------------------------------------------------------------


def test_a_resync_starts_over_from_round_0(reported):
    session = reported.session
    for _ in range(4):
        reported.get(reported.commit())
    session.replica.weights[3] += 1  # a bit flipped by a ray
    trace, start_over = reported.get(Resync(4, reported.truth.digest()))
    # the digests of the rounds before, from which the coordinator finds the first wrong one
    assert trace.message.first == 1
    assert len(trace.message.digests) == 4
    assert isinstance(start_over, StartOver)
    assert reported.truth.digest().hex() in start_over.reason
    (greeting,) = session.opened(reported.fresh(), 0.0)
    assert (greeting.message.round, greeting.message.head) == (0, reported.manifest.run_id)
    assert session.next_probe() is None
    # the coordinator had an older message of ours and asks who we are: the hello is on its way
    assert reported.get(Identify()) == []
    reported.get(reported.welcome())
    assert session.behind == 4
    reported.get(History(tuple(commit.encode() for commit in reported.commits)))
    assert session.replica.digest() == reported.truth.digest()
    assert session.next_probe() == (4, -5)


def test_a_report_is_forgotten_when_starting_over(reported):
    reported.get(Resync(4, bytes(16)))
    reported.session.opened(reported.fresh(), 0.0)
    assert reported.get(reported.welcome()) == []
    assert reported.session.next_probe() == (0, -4)


def test_a_difference_at_round_0_cannot_be_mended(following):
    (end,) = following.get(Resync(0, bytes(16)))
    assert end.code is Exit.MISMATCH
    assert following.session.stage is Stage.ENDED


def test_a_wrong_digest_at_the_end_waits_for_the_coordinators_word(make_manifest):
    rig = Rig(make_manifest(rounds=1)).in_stage(Stage.FOLLOWING)
    rig.get(rig.commit())
    rig.session.replica.weights[0] += 1
    (progress,) = rig.get(Finished(1, rig.truth.digest()))
    assert progress.message.digest == rig.session.replica.digest() != rig.truth.digest()
    assert rig.session.stage is Stage.FOLLOWING
    _, start_over = rig.get(Resync(1, rig.truth.digest()))
    assert isinstance(start_over, StartOver)


def test_an_end_before_all_commits_have_come_asks_for_them(following):
    following.commit()
    assert following.get(Finished(1, following.truth.digest())) == [following.hello()]


# ---- going on -----------------------------------------------------------------------------------------------------


def test_saved_weights_are_gone_on_with(make_manifest):
    manifest = make_manifest()
    first = Rig(manifest).in_stage(Stage.FOLLOWING)
    for _ in range(3):
        first.get(first.commit())
    rig = Rig(manifest, first.session.replica)
    (greeting,) = rig.session.on_link_up()
    assert (greeting.message.round, greeting.message.head) == (3, first.truth.head)
    assert rig.get(first.welcome(exponent=-5)) == [Open(manifest)]
    assert rig.session.next_probe() == (3, -5)


def test_a_manifest_that_is_not_the_tickets(rig, make_manifest):
    other = make_manifest(rank=5)
    rig.in_stage(Stage.GREETING)
    (end,) = rig.get(msgspec.structs.replace(rig.welcome(), manifest=other.encode()))
    assert end.code is Exit.WRONG_KEY
    assert rig.session.stage is Stage.ENDED


def test_a_manifest_that_this_version_cannot_read(make_manifest):
    data = b"\x81\xa8protocol\x02"
    rig = Rig(make_manifest())
    from zo.manifest import run_id

    rig.session = Session(run_id(data), BASE, TOKENIZER, "n", None)
    rig.session.on_link_up()
    (end,) = rig.get(msgspec.structs.replace(rig.welcome(), manifest=data))
    assert end.code is Exit.REFUSED
    assert "cannot read the run's manifest" in end.reason


# ---- silence where it is the coordinator's turn -------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.GREETING, Stage.FOLLOWING])
def test_hello_is_said_again_after_silence(rig, stage):
    # The coordinator may have given this node up for gone, when its queue was full, without the connection breaking.
    for _ in range(5):
        rig.commit()
    session = rig.in_stage(stage).session
    assert session.next_probe() is None
    times, now = [], 0.0
    while now < 1000:
        now += 1.0
        if session.on_tick(now):
            times.append(now)
    gaps = np.diff([1.0, *times])
    assert gaps[0] == GREET_S
    assert np.all(np.diff(gaps) > 0)


def test_what_comes_of_the_session_before_puts_hello_off_but_not_for_ever(rig):
    session, said, commit = rig.in_stage(Stage.GREETING).session, [], rig.commit()
    for now in range(0, 2000, 10):
        rig.get(commit, float(now))
        if session.on_tick(float(now)):
            said.append(now)
    assert len(said) == 4
    assert min(np.diff([0, *said])) >= 480


def test_any_message_ends_the_silence(rig):
    commits = [rig.commit() for _ in range(5)]
    session = rig.in_stage(Stage.FOLLOWING).session
    now = 0.0
    for commit in commits:
        assert session.on_tick(now) == []
        assert session.on_tick(now + GREET_S - 1) == []
        rig.get(commit, now + GREET_S - 1)
        now += GREET_S


def test_who_has_something_to_probe_is_not_waiting(following):
    assert following.session.on_tick(0.0) == []
    assert following.session.on_tick(1e9) == []
    assert following.session.next_probe() == (0, -4)


# ---- catching up by snapshot --------------------------------------------------------------------------------------


class FarBehind(Rig):
    """A run of some rounds, and a coordinator that offers a snapshot of the last but two."""

    def __init__(self, manifest, replica=None, download=None, rounds=6):
        super().__init__(manifest, replica)
        self.session = Session(
            manifest.run_id,
            BASE,
            TOKENIZER,
            "n",
            (manifest, replica) if replica else None,
            download,
        )
        for _ in range(rounds):
            self.commit()
            if self.truth.round == rounds - 2:
                self.data = encode_snapshot(self.truth, manifest)
                self.snapshot_head = self.truth.head
        self.snapshot_round = rounds - 2
        self.content = content_address(self.data)

    def offer(self, **change):
        costs = Offer(self.content, self.snapshot_round, len(self.data), 100, 8, 10**9, 10**9, True)
        return msgspec.structs.replace(costs, **change)

    def offered(self, now=0.0, **change):
        """What it does when it is made the offer."""
        effects = self.get(msgspec.structs.replace(self.welcome(), offer=self.offer(**change)), now)
        if effects and isinstance(effects[0], Open) and self.session.replica is None:
            self.session.opened(self.fresh(), now)
        return [each for each in effects if not isinstance(each, Open)]

    def piece(self, offset, size=100, data=None):
        data = self.data if data is None else data
        return Piece(self.content, offset, len(data), data[offset : offset + size])

    def take_all(self, effects, data=None):
        """Answer all requests, whatever size of piece is asked for; the last effects."""
        seen = []
        queue = list(effects)
        while queue:
            effect = queue.pop(0)
            seen.append(effect)
            if isinstance(effect, Transmit) and isinstance(effect.message, Fetch):
                queue += self.get(self.piece(effect.message.offset, PIECE_BYTES, data))
        return seen


@pytest.fixture
def far_behind(make_manifest):
    rig = FarBehind(make_manifest())
    rig.session.on_link_up()
    return rig


@pytest.mark.parametrize("is_saved", [False, True])
def test_how_long_the_base_takes_to_load_says_nothing_of_the_link(make_manifest, is_saved):
    manifest = make_manifest()
    rig = FarBehind(manifest, Replica(manifest, zeros(500)) if is_saved else None)
    rig.session.on_link_up()
    rig.get(msgspec.structs.replace(rig.welcome(), offer=rig.offer(replay_bytes=8, replay_codes=10**8)), 0.0)
    if not is_saved:
        rig.session.opened(rig.fresh(), 60.0)
    rig.session.loaded(60.0)
    asked = rig.get(rig.piece(0), 60.0 + 1e-3)
    assert [type(each.message) for each in asked[1:]] == [Fetch] * len(asked[1:])
    assert rig.session.stage is Stage.FETCHING


def test_an_offer_is_tried_with_the_first_piece(far_behind):
    assert far_behind.offered() == [Transmit(Fetch(far_behind.content, 0))]
    assert far_behind.session.stage is Stage.FETCHING
    assert far_behind.session.next_probe() is None
    assert far_behind.session.behind == 6


def test_a_snapshot_and_the_rest_lead_to_the_same_weights(far_behind):
    *_, keep, jumped, follow = far_behind.take_all(far_behind.offered())
    assert keep == Keep(far_behind.content, far_behind.data)
    assert jumped == Jumped(4)
    assert follow == Transmit(Follow(4, far_behind.snapshot_head))
    assert far_behind.session.stage is Stage.FOLLOWING
    assert far_behind.session.download is None
    assert far_behind.session.way == "snapshot of round 4"
    far_behind.get(History(tuple(commit.encode() for commit in far_behind.commits[4:])))
    assert far_behind.session.replica.digest() == far_behind.truth.digest()
    assert far_behind.session.replica.head == far_behind.truth.head
    assert far_behind.session.next_probe() == (6, -5)


def test_a_snapshot_of_the_round_in_progress_is_gone_on_from_at_once(make_manifest):
    rig = FarBehind(make_manifest())
    rig.session.on_link_up()
    rig.data = encode_snapshot(rig.truth, rig.manifest)
    rig.content, rig.snapshot_round = content_address(rig.data), 6
    rig.take_all(rig.offered())
    assert rig.session.next_probe() == (6, -4)


def test_a_first_piece_that_comes_slowly_makes_it_replay(far_behind):
    far_behind.session.work_per_s = 1e30
    size = len(far_behind.data)
    far_behind.offered(now=0.0, replay_bytes=size - 150, replay_codes=0, tail_bytes=0, tail_codes=0)
    effects = far_behind.get(far_behind.piece(0), now=10.0)
    assert effects == [
        Keep(far_behind.content, far_behind.data[:100]),
        Transmit(Follow(0, far_behind.manifest.run_id)),
    ]
    assert far_behind.session.stage is Stage.FOLLOWING
    assert "link 10 B/s" in far_behind.session.way
    # what was asked for before that may still come
    assert far_behind.get(far_behind.piece(100)) == []
    far_behind.get(History(tuple(commit.encode() for commit in far_behind.commits)))
    assert far_behind.session.replica.digest() == far_behind.truth.digest()


def test_a_first_piece_that_shows_a_saving_makes_it_go_on(far_behind):
    far_behind.session.work_per_s = 1e30
    size = len(far_behind.data)
    far_behind.offered(now=0.0, replay_bytes=size - 50, replay_codes=0, tail_bytes=0, tail_codes=0)
    _, fetch, *_ = far_behind.get(far_behind.piece(0), now=10.0)
    assert fetch == Transmit(Fetch(far_behind.content, 100))
    assert far_behind.session.stage is Stage.FETCHING


def test_the_choice_is_made_anew_on_every_connection(far_behind):
    """A link may have become slower: pieces that came before do not decide for ever."""
    far_behind.session.work_per_s = 1e30
    costs = {"replay_codes": 0, "tail_bytes": 0, "tail_codes": 0}
    size = len(far_behind.data)
    far_behind.offered(replay_bytes=size - 150, **costs)
    far_behind.get(far_behind.piece(0), now=10.0)
    assert far_behind.session.stage is Stage.FOLLOWING
    far_behind.session.on_link_down()
    far_behind.session.on_link_up()
    effects = far_behind.offered(now=20.0, replay_bytes=size - 150, **costs)
    assert effects == [Transmit(Fetch(far_behind.content, 100))]  # after what is here
    far_behind.get(far_behind.piece(100), now=30.0)
    assert far_behind.session.stage is Stage.FETCHING  # the rest is less than a replay now
    assert "link 10 B/s" in far_behind.session.way


def test_a_revert_cannot_be_replayed_and_makes_it_ask_for_a_snapshot(make_manifest):
    rig = FarBehind(make_manifest())
    session = rig.session
    session.on_link_up()
    rig.get(rig.welcome())
    session.opened(rig.fresh(), 0.0)
    revert = rig.truth.revert(2, 6, (), lambda first, last: rig.commits[first:last])
    frames = [*(commit.encode() for commit in rig.commits), revert.encode()]
    effects = rig.get(History(tuple(frames)))
    assert session.replica.round == 6
    assert effects[-1] == rig.hello()
    assert session.stage is Stage.GREETING
    # however slow the snapshot and quick the replay: only the snapshot leads on
    rig.truth.apply(revert, history=lambda first, last: rig.commits[first:last])
    rig.data = encode_snapshot(rig.truth, rig.manifest)
    rig.content, rig.snapshot_round = content_address(rig.data), 7
    rig.take_all(rig.offered(replay_bytes=0, replay_codes=0))
    assert session.replica.digest() == rig.truth.digest()
    assert session.replica.round == 7
    # from now on replays are a way again
    session.on_link_up()
    rig.offered(replay_bytes=0, replay_codes=0)
    rig.get(rig.piece(0))
    assert session.stage is Stage.FOLLOWING


def test_a_revert_and_no_snapshot_ends_it(make_manifest):
    rig = FarBehind(make_manifest())
    rig.session.on_link_up()
    rig.get(rig.welcome())
    rig.session.opened(rig.fresh(), 0.0)
    revert = rig.truth.revert(2, 6, (), lambda first, last: rig.commits[first:last])
    rig.get(History((*(commit.encode() for commit in rig.commits), revert.encode())))
    (end,) = rig.get(rig.welcome(7))
    assert end == End(Exit.DAMAGED, "the ledger takes rounds back, and the coordinator has no snapshot")


def test_an_interrupted_download_goes_on_with_what_was_kept(make_manifest):
    first = FarBehind(make_manifest())
    first.session.on_link_up()
    first.offered()
    (keep, *_) = first.get(first.piece(0))
    # another process, with what the first one kept
    rig = FarBehind(make_manifest(), download=Download(keep.content, keep.data))
    rig.session.on_link_up()
    assert rig.offered() == [Transmit(Fetch(rig.content, 100))]
    effects = rig.take_all(rig.get(rig.piece(100)))
    assert Jumped(4) in effects
    assert rig.session.replica.round == 4


def test_a_broken_connection_does_not_cost_what_has_come(far_behind):
    far_behind.offered()
    far_behind.get(far_behind.piece(0))
    far_behind.session.on_link_down()
    far_behind.session.on_link_up()
    assert far_behind.offered() == [Transmit(Fetch(far_behind.content, 100))]


def test_a_newer_snapshot_is_begun_anew(far_behind):
    far_behind.offered()
    far_behind.get(far_behind.piece(0))
    far_behind.session.on_link_up()
    other = bytes(16)
    assert far_behind.offered(content=other) == [Transmit(Fetch(other, 0))]
    assert far_behind.get(far_behind.piece(100)) == []  # of the one before


def test_a_damaged_download_is_dropped_and_begun_anew(make_manifest):
    rig = FarBehind(make_manifest(), download=Download(b"", b""))
    rig.session.download = Download(rig.content, b"x" * 50)
    rig.session.on_link_up()
    *_, dropped, hello = rig.take_all(rig.offered())
    assert dropped == Jumped(0)
    assert hello == rig.hello()
    assert rig.session.replica.round == 0
    assert Jumped(4) in rig.take_all(rig.offered())


def test_a_snapshot_that_was_removed_meanwhile_is_given_up(far_behind):
    far_behind.offered()
    far_behind.get(far_behind.piece(0))
    effects = far_behind.get(Piece(far_behind.content, 100, 0, b""))
    assert effects == [Jumped(0), far_behind.hello()]
    assert far_behind.session.download is None


def test_a_snapshot_of_another_size_than_offered_is_given_up(far_behind):
    far_behind.offered()
    effects = far_behind.get(Piece(far_behind.content, 0, 2**40, b"x"))
    assert effects == [Jumped(0), far_behind.hello()]


def test_an_offer_of_more_bytes_than_weights_can_have_ends_it(far_behind):
    (end,) = far_behind.offered(num_bytes=10**9)
    assert end == End(
        Exit.DAMAGED, "the coordinator offers a snapshot of 1,000,000,000 bytes for 500 weights"
    )


def test_intact_bytes_that_are_no_snapshot_end_it(far_behind):
    data = bytes(len(far_behind.data))
    far_behind.content = content_address(data)
    *_, end = far_behind.take_all(far_behind.offered(), data)
    assert end.code is Exit.DAMAGED
    assert end.reason.startswith("the coordinator's snapshot cannot be used: not a snapshot")


def test_pieces_are_taken_only_while_fetching(far_behind):
    far_behind.offered()
    far_behind.session.on_link_down()
    assert far_behind.get(far_behind.piece(0)) == []
    far_behind.session.on_link_up()
    assert far_behind.get(far_behind.piece(0)) == []


def test_a_fetch_that_nobody_answers_is_asked_for_again(far_behind):
    session = far_behind.session
    far_behind.offered()
    assert session.on_tick(0.0) == []
    assert session.on_tick(599.0) == []
    assert session.on_tick(600.0) == [far_behind.hello()]


def test_a_node_that_has_commits_needs_no_manifest_again(make_manifest):
    manifest = make_manifest()
    saved = FarBehind(manifest)
    replica = saved.fresh()
    for commit in saved.commits[:3]:
        replica.apply(commit)
    rig = FarBehind(manifest, replica)
    rig.session.on_link_up()
    welcome = msgspec.structs.replace(rig.welcome(), manifest=b"")
    assert rig.get(welcome) == [Open(manifest)]
    assert rig.session.stage is Stage.FOLLOWING


def test_a_welcome_without_the_manifest_to_a_node_that_has_none_ends_it(rig):
    rig.in_stage(Stage.GREETING)
    (end,) = rig.get(msgspec.structs.replace(rig.welcome(), manifest=b""))
    assert end == End(Exit.REFUSED, "the coordinator sent no manifest")


# ---- the trace ----------------------------------------------------------------------------------------------------


def test_a_resync_is_answered_with_the_digests_of_the_last_rounds(following):
    for _ in range(5):
        following.get(following.commit())
    digests, replica = [], following.fresh()
    for commit in following.commits:
        replica.apply(commit)
        digests.append(replica.digest())
    trace, start_over = following.get(Resync(5, bytes(16)))
    assert trace == Transmit(Trace(1, tuple(digests)))
    assert isinstance(start_over, StartOver)


def test_the_trace_does_not_reach_over_a_snapshot(far_behind):
    far_behind.take_all(far_behind.offered())
    far_behind.get(History(tuple(commit.encode() for commit in far_behind.commits[4:])))
    trace, _ = far_behind.get(Resync(6, bytes(16)))
    assert trace.message.first == 5
    assert len(trace.message.digests) == 2


def test_the_trace_is_bounded(make_manifest):
    rig = Rig(make_manifest(rounds=300)).in_stage(Stage.FOLLOWING)
    for _ in range(100):
        rig.get(rig.commit())
    trace, _ = rig.get(Resync(100, bytes(16)))
    assert trace.message.first == 37
    assert len(trace.message.digests) == 64


def test_while_far_behind_no_digest_is_taken_for_the_trace(make_manifest):
    rig = Rig(make_manifest(rounds=300)).in_stage(Stage.FOLLOWING)
    for _ in range(3):
        rig.get(rig.commit())
    rig.session.on_link_up()
    missed = [rig.commit() for _ in range(90)]
    rig.get(rig.welcome())
    rig.get(History(tuple(commit.encode() for commit in missed[:5])))
    assert rig.get(Resync(8, bytes(16)))[0] == StartOver(
        f"the weights of round 8 differ from the ledger's digest {'00' * 16}"
    )
    rig.get(History(tuple(commit.encode() for commit in missed[5:])))
    trace, _ = rig.get(Resync(93, bytes(16)))
    assert (trace.message.first, len(trace.message.digests)) == (30, 64)


def test_a_pool_snapshot_over_weights_that_are_wrong_makes_the_node_start_over(make_manifest):
    """Such a snapshot has no weights of its own: the node's are moved on, and a wrong bit shows in the digest."""
    manifest = make_manifest(policy="pool", pool_size=16)
    truth, wrong = Replica(manifest, zeros(500)), Replica(manifest, zeros(500))
    for round in range(10):
        commit = Commit(round, (100_000,), (-5,), (0,), b"\x11\x22", truth.head)
        truth.apply(commit)
        if round < 3:
            wrong.apply(commit)
    wrong.weights[7] ^= 1
    data = encode_snapshot(truth, manifest, with_weights=False)
    offer = Offer(content_address(data), 10, len(data), 0, 0, 10**9, 10**9, True)
    session = Session(manifest.run_id, BASE, TOKENIZER, "n", (manifest, wrong))
    for replica in (None, Replica(manifest, zeros(500))):
        if replica is None:
            session.on_link_up()
        else:
            assert session.opened(replica, 0.0)
        session.on_message(Welcome(PROTOCOL_VERSION, 1, b"", 10, -4, offer), 0.0)
        effects = session.on_message(Piece(offer.content, 0, len(data), data), 0.001)
        if replica is None:
            assert isinstance(effects[-1], StartOver)
    assert session.replica.digest() == truth.digest()
