"""A node's session in a pipelined run: what it probes ahead, what it keeps and sends again, and when it waits."""

import numpy as np
import pytest

from transport.brevity import brief
from transport.messages import (
    PROTOCOL_VERSION,
    Audit,
    Commit,
    Finished,
    Hello,
    History,
    Identify,
    Offer,
    Report,
    Resync,
    Welcome,
)
from transport.session import RESEND_S, Applied, End, Session, Stage, StartOver, Transmit
from zo.replica import Replica
from zo.steps import step_rule
from zo.walk import first_step
from zo.weights import zeros

DIGESTS = b"\xb0" * 16, b"\x70" * 16
OFFER = Offer(b"\xcc" * 16, 3, 500, 0, 0, 10**6, 10**6, False)


class Pipelined:
    """A session that follows a run whose commit r says the exponent r for round r + 2."""

    def __init__(self, make_manifest, **fields):
        self.manifest = make_manifest(**{"pipeline": 1, **fields})
        self.truth = Replica(self.manifest, zeros(500))
        self.commits = []
        self.session = Session(self.manifest.run_id, *DIGESTS, "n", None)
        self.session.on_link_up()
        self.get(self.welcome())
        self.session.opened(Replica(self.manifest, zeros(500)), 0.0)

    def commit(self, *participants, step=1000):
        number = len(self.commits)
        participants = participants or (0, 1)
        codes = bytes(range(1, 1 + 2 * len(participants)))
        commit = Commit(number, (step,), (number,), participants, codes, self.truth.head)
        self.truth.apply(commit)
        self.commits.append(commit)
        return commit

    def welcome(self, exponents=(-4, -4), offer=None):
        number = len(self.commits)
        return Welcome(PROTOCOL_VERSION, 0, self.manifest.encode(), number, exponents, offer)

    def get(self, message, now=0.0):
        return self.session.on_message(message, now)

    def probed(self, round, now=0.0):
        return self.session.on_probed(round, np.array([round, -round], np.int8), 1.0, now)

    def reconnect(self):
        """A new connection, up to the greeting."""
        self.session.on_link_down()
        self.session.on_link_up()


def report(round):
    return Transmit(Report(round % 256, np.array([round, -round], np.int8).tobytes()))


@pytest.fixture
def node(make_manifest):
    return Pipelined(make_manifest)


@pytest.fixture
def both(node):
    """Both reports are out."""
    node.probed(0)
    node.probed(1)
    return node


def test_a_report_is_followed_by_the_next_probe_and_that_by_waiting(node):
    session = node.session
    assert session.next_probe() == (0, -4)
    assert node.probed(0) == [report(0)]
    assert session.stage is Stage.FOLLOWING
    assert session.next_probe() == (1, -4)
    assert node.probed(1) == [report(1)]
    assert session.stage is Stage.REPORTED
    assert session.next_probe() is None


def test_a_commit_settles_its_report_and_makes_room_for_one_probe(both):
    commit = both.commit()
    assert both.get(commit) == [Applied(commit, own_codes=True, was_late=False)]
    assert both.session.stage is Stage.FOLLOWING
    assert both.session.next_probe() == (2, 0)
    assert both.probed(2) == [report(2)]
    assert both.session.stage is Stage.REPORTED
    second = both.commit()
    assert both.get(brief(commit, second)) == [Applied(second, own_codes=True, was_late=False)]
    assert both.session.next_probe() == (3, 1)


def test_two_commits_at_once_make_room_for_two_probes(both):
    both.get(both.commit())
    both.get(both.commit())
    assert both.session.next_probe() == (2, 0)
    both.probed(2)
    assert both.session.next_probe() == (3, 1)


def test_a_commit_that_comes_during_the_next_probe_leaves_it_standing(node):
    node.probed(0)
    node.get(node.commit())
    assert node.session.next_probe() == (1, -4)
    assert node.probed(1) == [report(1)]
    assert node.session.next_probe() == (2, 0), "two reports at these weights"


def test_a_probe_of_a_round_that_was_closed_meanwhile_is_dropped(node):
    node.probed(0)
    for _ in range(2):
        node.get(node.commit(1))
    assert node.probed(1) == []
    assert node.session.next_probe() == (2, 0)


def test_a_probe_that_is_no_turn_is_dropped(node):
    assert node.probed(1) == [], "round 0 comes first"
    assert node.probed(2) == []
    node.probed(0)
    assert node.probed(0) == []
    assert node.session.next_probe() == (1, -4)


def test_codes_that_are_not_in_the_commit_came_too_late(both):
    commit = both.commit(1)
    assert both.get(commit) == [Applied(commit, own_codes=False, was_late=True)]
    assert both.session.next_probe() == (2, 0)


def test_both_reports_are_sent_again_after_silence_and_on_a_new_connection(both):
    assert both.session.on_tick(RESEND_S - 0.1) == []
    assert both.session.on_tick(RESEND_S) == [report(0), report(1)]
    assert both.session.on_tick(RESEND_S + 19.9) == []
    both.reconnect()
    assert both.get(both.welcome()) == [report(0), report(1)]
    assert both.session.stage is Stage.REPORTED


def test_an_identify_brings_both_reports_after_the_welcome(both):
    assert isinstance(both.get(Identify())[0].message, Hello)
    assert both.get(both.welcome()) == [report(0), report(1)]


def test_on_a_new_connection_the_probe_ahead_goes_on(node):
    node.probed(0)
    node.reconnect()
    assert node.get(node.welcome()) == [report(0)]
    assert node.session.stage is Stage.FOLLOWING
    assert node.session.next_probe() == (1, -4)


def test_a_probe_that_ends_without_a_connection_is_sent_with_the_other_one(node):
    node.probed(0)
    node.session.on_link_down()
    assert node.probed(1) == []
    node.session.on_link_up()
    assert node.get(node.welcome()) == [report(0), report(1)]


def test_the_report_that_is_left_is_sent_again_once_what_was_missed_is_here(both):
    commit = both.commit()
    both.reconnect()
    assert both.get(both.welcome((-4, 0))) == [], "first it catches up"
    applied, again = both.get(History((commit.encode(),)))
    assert applied == Applied(commit, own_codes=True, was_late=False)
    assert again == report(1)
    assert both.session.next_probe() == (2, 0)
    second = both.commit()
    assert both.get(second) == [Applied(second, own_codes=True, was_late=False)]


def test_reports_that_counted_while_away_are_not_sent_again(both):
    frames = tuple(both.commit().encode() for _ in range(2))
    both.reconnect()
    both.get(both.welcome((0, 1)))
    assert [type(each) for each in both.get(History(frames))] == [Applied, Applied]
    assert both.session.next_probe() == (2, 0)


def test_who_comes_in_the_middle_knows_the_exponents_of_both_rounds(make_manifest):
    node = Pipelined(make_manifest)
    frames = tuple(node.commit().encode() for _ in range(5))
    node.reconnect()
    node.get(node.welcome((3, 4)))
    node.get(History(frames))
    assert node.session.next_probe() == (5, 3)
    node.probed(5)
    assert node.session.next_probe() == (6, 4)


def test_who_comes_back_without_having_missed_a_commit_does_too(make_manifest):
    node = Pipelined(make_manifest)
    for _ in range(5):
        node.get(node.commit())
    saved = node.manifest, node.session.replica
    session = node.session = Session(node.manifest.run_id, *DIGESTS, "n", saved)
    session.on_link_up()
    node.get(node.welcome((3, 4)))
    assert session.next_probe() == (5, 3)
    node.probed(5)
    assert session.next_probe() == (6, 4)


def test_a_snapshot_or_starting_over_makes_reports_void(both):
    both.reconnect()
    both.commit()
    both.get(both.welcome((-4, 0), OFFER))
    assert both.session.stage is Stage.FETCHING
    assert both.session._reports == {}


def test_reports_of_wrong_weights_are_void(both):
    both.get(both.commit())
    *_, start_over = both.get(Resync(1, bytes(16)))
    assert isinstance(start_over, StartOver)
    both.session.opened(Replica(both.manifest, zeros(500)), 0.0)
    assert both.get(both.welcome((-4, 0))) == []


def test_after_the_last_round_there_is_nothing_to_probe_ahead(make_manifest):
    node = Pipelined(make_manifest, rounds=2)
    node.probed(0)
    node.probed(1)
    node.get(node.commit())
    assert node.session.next_probe() is None
    assert node.session.stage is Stage.REPORTED, "the last report is still out"
    assert node.session.on_tick(RESEND_S) == [report(1)]
    node.get(node.commit())
    assert node.session.stage is Stage.FOLLOWING
    *_, end = node.get(Finished(2, node.truth.digest()))
    assert isinstance(end, End)


def test_an_audit_is_answered_before_the_next_report_of_these_weights(make_manifest):
    node = Pipelined(make_manifest, rows=("{}",))
    node.probed(0)
    node.probed(1)
    node.get(Audit(1, 77))
    assert node.session.next_audit() is None, "it has other weights still"
    node.get(node.commit())
    assert node.session.next_audit() == (1, 77)
    assert node.session.next_probe() is None
    node.session.on_audited(1, (1.0, 2.0))
    assert node.session.next_probe() == (2, 0)


def test_a_walk_follows_the_last_commit_in_units_of_its_own_round(make_manifest):
    node = Pipelined(make_manifest, directions=2, local_steps=2, decay="constant")
    session, rule = node.session, step_rule(node.manifest)
    by_schedule = first_step(rule, 0, -4)
    assert [session.walk_step(round, -4) for round in range(2)] == [by_schedule, by_schedule]
    node.get(node.commit(step=1000))  # of four votes, one of which would have been a whole step
    assert session.walk_step(1, -4) == by_schedule
    # Codes of round 0 were in units of 2^-4, those of round 2 are in 2^0.
    assert session.walk_step(2, 0) == 4000 << 4
    node.get(node.commit(step=1000))
    assert session.walk_step(3, 1) == 4000 << 5
    # Of round 2 the unit was 2^0, of round 4 it is 2^2.
    node.get(node.commit(step=1000))
    assert session.walk_step(4, 2) == 4000 << 2


def test_who_is_not_pipelined_waits_after_each_report(make_manifest):
    node = Pipelined(make_manifest, pipeline=0)
    node.get(Identify())
    node.get(node.welcome(-4))
    node.probed(0)
    assert node.session.stage is Stage.REPORTED
    assert node.session.next_probe() is None
