"""Public audits at the coordinator: whom it asks and when, whose answer counts, what becomes of who is far."""

import json

import numpy as np
import pytest

from coordinator.audit_rows import audit_rows
from coordinator.config import ServiceConfig
from transport.messages import PROTOCOL_VERSION, Answer, Audit, Commit, Hello, Report
from zo.manifest import ManifestError

KEYS = [bytes([node] * 32) for node in range(3)]


def greet(coordinator, node, session=None):
    manifest = coordinator.manifest
    base, tokenizer = bytes.fromhex(manifest.base.digest), bytes.fromhex(manifest.base.tokenizer_digest)
    replica = coordinator.replay()
    hello = Hello(PROTOCOL_VERSION, manifest.run_id, base, tokenizer, replica.round, replica.head, f"n{node}")
    return coordinator.message(session or b"%d" % node, KEYS[node], hello)


def report(coordinator, node, session=None):
    number = coordinator.conductor.round
    return coordinator.message(session or b"%d" % node, KEYS[node], Report(number % 256, b"\x01\x02"))


def answer(coordinator, node, round, *losses):
    message = Answer(round, np.array(losses, "<f4").tobytes())
    return coordinator.message(b"%d" % node, KEYS[node], message)


@pytest.fixture
def run(make_manifest, virtual_coordinator):
    """Three nodes; the weights of round 1 are audited."""
    coordinator = virtual_coordinator(make_manifest(rows=("{}",)), ServiceConfig(quorum=3))
    coordinator.audit_sample = lambda round: 1000 + round if round in (1, 3) else None
    coordinator.start()
    for node in range(3):
        greet(coordinator, node)
    for node in range(3):
        report(coordinator, node)
    return coordinator


def sent(coordinator, kind):
    return [(to, message) for to, message in coordinator.outbox if isinstance(message, kind)]


def test_who_is_sent_the_commit_is_asked_just_before_it(run):
    assert [message for to, message in run.outbox if to == b"1"][-2:] == [Audit(1, 1001), run.commits[0]]
    assert len(sent(run, Audit)) == 3


def test_answers_are_judged_when_their_round_closes(run):
    for node in range(3):
        answer(run, node, 1, 4.5, 4.25)
    for node in range(3):
        assert run.audits == []
        report(run, node)
    assert run.audits == [dict.fromkeys(range(3), (4.5, 4.25))]
    for node in range(3):
        report(run, node)  # of round 2, which has none
    assert len(run.audits) == 1


@pytest.mark.attack
def test_who_reports_and_does_not_answer_is_counted(run):
    answer(run, 0, 1, 1.0, 1.0)
    for node in range(3):
        report(run, node)
    assert run.audits == [{0: (1.0, 1.0), 1: None, 2: None}]


@pytest.mark.attack
def test_the_first_answer_stands_and_one_for_another_round_is_nothing(run):
    for round, loss in ((0, 7.0), (2, 7.0), (1, 1.0), (1, 2.0)):
        assert answer(run, 0, round, loss, loss) == []
    for node in range(3):
        report(run, node)
    assert run.audits[0][0] == (1.0, 1.0)


def test_who_came_back_meanwhile_is_not_expected_to_answer(run):
    greet(run, 2, b"again")
    answer(run, 0, 1, 1.0, 1.0)
    answer(run, 1, 1, 1.0, 1.0)
    for node, session in ((0, None), (1, None), (2, b"again")):
        report(run, node, session)
    assert run.audits == [{0: (1.0, 1.0), 1: (1.0, 1.0)}]


@pytest.mark.attack
def test_nobody_answers_who_was_not_asked(make_manifest, virtual_coordinator):
    coordinator = virtual_coordinator(make_manifest(), ServiceConfig(quorum=1))
    greet(coordinator, 0)
    assert answer(coordinator, 0, 0, 1.0, 1.0) == []
    report(coordinator, 0)
    assert coordinator.audits == []
    assert len(sent(coordinator, Commit)) == 1


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("rows.jsonl", '{"text": "a"}\n\n {"text": "b"} \n', ('{"text": "a"}', '{"text": "b"}')),
        ("text.txt", "a\nß\n", ('{"text": "a\\nß\\n"}',)),
    ],
)
def test_public_rows_are_the_lines_of_a_file(tmp_path, name, text, rows):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    assert audit_rows(path) == rows
    assert all(isinstance(json.loads(row), dict) for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("rows.jsonl", "", "there is no row in it"),
        ("rows.txt", " \n", "there is no row in it"),
        ("rows.jsonl", '{"text": "a"}\n[1]', r"row 2 is no object in JSON: '\[1\]'"),
        ("rows.jsonl", "nonsense", "row 1 is no object in JSON"),
        ("rows.tsv", "a\tb", "public rows come as .jsonl or .txt"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_a_file_of_no_rows_is_named(tmp_path, name, text, reason):
    path = tmp_path / name
    if text is not None:
        path.write_text(text, "utf-8")
    with pytest.raises(ManifestError, match=rf"--audit .*{name}: {reason}"):
        audit_rows(path)
