"""Public audits at a node: when it answers, in which order, and what it tells."""

import numpy as np
import pytest

from transport.messages import PROTOCOL_VERSION, Answer, Audit, Commit, Report, Welcome
from transport.session import Session, Transmit
from zo.replica import Replica
from zo.weights import zeros

ROW = '{"text": "public"}'
CODES = np.array([3, -4], np.int8)


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(rows=(ROW,))


def joined(manifest):
    session = Session(manifest.run_id, b"\xb0" * 16, b"\x70" * 16, "n", None)
    session.on_link_up()
    session.on_message(Welcome(PROTOCOL_VERSION, 0, manifest.encode(), 0, -4, None), 0.0)
    session.opened(Replica(manifest, zeros(500)), 0.0)
    return session


def commit(session):
    replica = session.replica
    return Commit(replica.round, (1000,), (-5,), (0,), b"\x01\x02", replica.head)


def test_an_audit_is_answered_at_its_round_and_before_the_report(manifest):
    session = joined(manifest)
    session.on_message(Audit(1, 77), 0.0)
    assert session.next_audit() is None
    assert session.next_probe() == (0, -4)  # of the round before
    session.on_message(commit(session), 0.0)
    assert session.next_audit() == (1, 77)
    assert session.next_probe() is None
    [answer] = session.on_audited(1, (4.5, 4.25))
    assert answer == Transmit(Answer(1, np.array([4.5, 4.25], "<f4").tobytes()))
    assert session.next_audit() is None
    assert session.next_probe() == (1, -5)
    [report] = session.on_probed(1, CODES, 1.0, 0.0)
    assert isinstance(report.message, Report)


def test_what_is_no_number_is_told_as_it_is(manifest):
    session = joined(manifest)
    session.on_message(Audit(0, 1), 0.0)
    [answer] = session.on_audited(0, (float("nan"), 1e300))
    assert str(np.frombuffer(answer.message.losses, "<f4")) == "[nan inf]"


def test_an_audit_is_answered_once(manifest):
    session = joined(manifest)
    session.on_message(Audit(0, 1), 0.0)
    assert session.on_audited(0, (1.0, 1.0))
    assert session.on_audited(0, (1.0, 1.0)) == []


@pytest.mark.parametrize("round", [0, 5])
def test_an_audit_of_a_round_that_is_over_or_not_reached_holds_nothing_up(manifest, round):
    session = joined(manifest)
    session.on_message(commit(session), 0.0)
    session.on_message(Audit(round, 1), 0.0)
    assert session.next_audit() is None
    assert session.next_probe() == (1, -5)
    assert session.on_audited(1, (1.0, 1.0)) == []


@pytest.mark.attack
def test_a_run_without_public_rows_answers_no_audit(make_manifest):
    """A coordinator cannot ask for losses on what the manifest does not name."""
    session = joined(make_manifest())
    session.on_message(Audit(0, 1), 0.0)
    assert session.next_audit() is None
    assert session.next_probe() == (0, -4)


def test_who_was_disconnected_forgets_what_was_asked(manifest):
    session = joined(manifest)
    session.on_message(Audit(0, 1), 0.0)
    session.on_link_down()
    assert session.next_audit() is None
    session.on_link_up()
    session.on_message(Welcome(PROTOCOL_VERSION, 0, b"", 0, -4, None), 0.0)
    assert session.next_audit() is None
    assert session.next_probe() == (0, -4)


def test_to_owe_an_answer_is_not_to_wait_in_vain(manifest):
    session = joined(manifest)
    session.on_message(Audit(0, 1), 0.0)
    assert session.on_tick(0.0) == session.on_tick(1000.0) == []
