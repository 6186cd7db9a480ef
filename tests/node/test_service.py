"""The node's service: what the session's effects do to the state on disk. Nobody is at the other end of the wire."""

import numpy as np
import pytest

from node.service import BudgetSpentError, Leaving, NodeError, NodeService
from node.state import StateDirectory
from transport.exits import Exit
from transport.keys import new_key_pair
from transport.messages import PROTOCOL_VERSION, Answer, Audit, Welcome, decode_from_node, encode
from transport.session import Jumped, Keep, Open, StartOver
from transport.sockets import Link
from transport.ticket import Ticket
from zo.commit import Commit
from zo.replica import Replica
from zo.weights import zeros


class Still:
    """A trainer that never measures anything."""

    estimator = ""

    def __init__(self, size):
        self.size = size

    def initial_weights(self):
        return zeros(self.size)

    def audit(self, weights, sample, agent=0):
        return 1.0, 2.0


@pytest.fixture
def manifest(make_manifest):
    return make_manifest()


@pytest.fixture
def state(tmp_path):
    state = StateDirectory(tmp_path / "state")
    with state.lock():
        yield state


@pytest.fixture
def make_service(state):
    services = []

    def make(manifest):
        service = NodeService(
            Ticket("127.0.0.1", 1, manifest.run_id, new_key_pair().public),
            state,
            manifest.base.digest,
            manifest.base.tokenizer_digest,
            lambda manifest: Still(manifest.adapter.size),
            name="n",
            connect_timeout_s=1.0,
            evaluate_every=0,
            show=lambda view: None,
            log=lambda record: None,
        )
        services.append(service)
        return service

    yield make
    for service in services:
        service._socket.close()


@pytest.fixture
def service(make_service, manifest):
    return make_service(manifest)


def wrong(manifest, agent=0):
    return Replica(manifest, np.ones(500, np.int32), 9, bytes([9] * 16), agent)


def test_weights_that_are_wrong_are_gone_from_disk_before_anything_else(
    service, state, manifest, monkeypatch
):
    """A kill right after the word to start over must not bring them back."""
    service._carry_out([(0, Open(manifest))])
    state.agent(0).save(wrong(manifest), manifest)

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    monkeypatch.setattr(service._sessions.by_agent[0], "opened", kill)
    with pytest.raises(Killed):
        service._carry_out([(0, StartOver("they differ"))])
    assert state.agent(0).load(manifest.run_id) is None
    assert not state.agent(0).snapshot_path.exists()


def test_a_node_goes_on_from_what_it_saved_and_saves_only_what_has_moved(make_service, state, make_manifest):
    manifest = make_manifest(count=2)
    state.save_manifest(manifest)
    saved = [
        Replica(manifest, np.full(500, agent, np.int32), 7 + agent, bytes(16), agent) for agent in range(2)
    ]
    for replica in saved:
        state.agent(replica.agent).save(replica, manifest)
    service = make_service(manifest)
    service._carry_out([(0, Open(manifest))])
    sessions = service._sessions.by_agent
    assert [(each.replica.round, each.replica.agent) for each in sessions.values()] == [(7, 0), (8, 1)]
    paths = [state.agent(agent).snapshot_path for agent in range(2)]
    for path in paths:
        path.unlink()
    service._save()
    assert [path.exists() for path in paths] == [False, False]
    sessions[1].replica = wrong(manifest, agent=1)
    service._save()
    assert [path.exists() for path in paths] == [False, True]


def test_after_starting_over_the_weights_are_those_of_round_0(service, state, manifest):
    service._carry_out([(0, Open(manifest))])
    service._sessions.by_agent[0].replica = wrong(manifest)
    service._carry_out([(0, StartOver("they differ"))])
    assert service._sessions.by_agent[0].replica.round == 0
    assert not service._sessions.by_agent[0].replica.weights.any()
    assert service.view.notice == "starting over: they differ"
    service._save()
    assert state.agent(0).load(manifest.run_id)[1].round == 0


def test_a_node_that_may_say_no_more_leaves_in_good_order(service, state, manifest, monkeypatch):
    service._carry_out([(0, Open(manifest))])
    service._sessions.by_agent[0].replica = wrong(manifest)
    carried_out = []

    def probe():
        raise BudgetSpentError("the privacy budget is spent")

    monkeypatch.setattr(service, "_loop", probe)
    monkeypatch.setattr(service._sessions, "leave", lambda: ["leave"])
    monkeypatch.setattr(service, "_carry_out", carried_out.extend)
    with pytest.raises(NodeError, match="the privacy budget is spent") as ended:
        service.run()
    assert ended.value.code is Exit.BUDGET
    assert carried_out == ["leave"]
    assert state.agent(0).load(manifest.run_id)[1].round == 9, "what it has is saved"


def test_a_node_that_cannot_go_on_says_so_before_it_ends(service, monkeypatch):
    """Else the end of the run would wait for its return."""
    carried_out = []

    def load():
        raise ValueError("rows.jsonl, line 2: no field 'text'")

    monkeypatch.setattr(service, "_loop", load)
    monkeypatch.setattr(service._sessions, "leave", lambda: ["leave"])
    monkeypatch.setattr(service, "_carry_out", carried_out.extend)
    with pytest.raises(ValueError, match="line 2"):
        service.run()
    assert carried_out == ["leave"]


def test_pieces_are_kept_until_the_snapshot_is_taken(service, state, manifest):
    service._carry_out([(0, Open(manifest)), (0, Keep(bytes(16), b"abc"))])
    assert bytes(state.agent(0).load_download().data) == b"abc"
    service._sessions.by_agent[0].replica = wrong(manifest)
    service._carry_out([(0, Jumped(9))])
    assert state.agent(0).load_download() is None
    assert state.agent(0).load(manifest.run_id)[1].round == 9


def test_a_snapshot_that_could_not_be_used_leaves_the_weights_alone(service, state, manifest):
    service._carry_out([(0, Open(manifest)), (0, Keep(bytes(16), b"abc"))])
    before = state.agent(0).load(manifest.run_id)
    service._carry_out([(0, Jumped(0))])
    assert state.agent(0).load_download() is None
    assert state.agent(0).load(manifest.run_id) == before


def test_an_opened_run_has_measured_its_kernel(service, manifest):
    service._carry_out([(0, Open(manifest))])
    assert 0 < service._sessions.by_agent[0].work_per_s < 1e14


def test_handshakes_in_a_row_that_fail_are_another_coordinator(service):
    service._on_link(Link.WRONG_KEY)
    service._on_link(Link.WRONG_KEY)
    with pytest.raises(NodeError, match="does not have the ticket's key") as failed:
        service._on_link(Link.WRONG_KEY)
    assert failed.value.code is Exit.WRONG_KEY


def test_a_coordinator_that_is_killed_again_and_again_is_not_taken_for_another(service):
    """It dies in the midst of a handshake, and then nobody listens there for a while."""
    for _ in range(20):
        service._on_link(Link.WRONG_KEY)
        service._on_link(Link.NOBODY)


def test_an_audit_is_answered_before_the_next_commit_takes_its_weights_away(
    make_service, make_manifest, monkeypatch
):
    """In a pipelined run two commits may come at once, and who reports without having answered is counted."""
    manifest = make_manifest(pipeline=1, rows=("{}",))
    service = make_service(manifest)
    welcome = Welcome(PROTOCOL_VERSION, 0, manifest.encode(), 0, (-4, -4), None)
    truth = Replica(manifest, np.zeros(500, np.int32))
    commits = []
    for number in range(2):
        commits.append(Commit(number, (9,), (-4,), (0,), b"\x10\x20", truth.head))
        truth.apply(commits[-1])
    frames = [encode(each) for each in (welcome, Audit(1, 77), *commits)]
    sent, arrivals = [], [([Link.UP], frames)]

    def poll(_timeout_s):
        if not arrivals:
            raise Leaving
        return arrivals.pop()

    monkeypatch.setattr(service._socket, "send", lambda frame: sent.append(decode_from_node(frame)) or True)
    monkeypatch.setattr(service._socket, "poll", poll)
    with pytest.raises(Leaving):
        service._loop()
    assert [each.round for each in sent if isinstance(each, Answer)] == [1]
    assert service._sessions.by_agent[0].replica.round == 2
