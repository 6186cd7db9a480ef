"""The node's service: what the session's effects do to the state on disk. Nobody is at the other end of the wire."""

import numpy as np
import pytest

from node.service import NodeService
from node.state import StateDirectory
from transport.keys import new_key_pair
from transport.session import Jumped, Keep, Open, StartOver
from transport.ticket import Ticket
from zo.replica import Replica
from zo.weights import zeros


class Still:
    """A trainer that never measures anything."""

    def __init__(self, size):
        self.size = size

    def initial_weights(self):
        return zeros(self.size)


@pytest.fixture
def manifest(make_manifest):
    return make_manifest()


@pytest.fixture
def state(tmp_path):
    state = StateDirectory(tmp_path / "state")
    with state.lock():
        yield state


@pytest.fixture
def service(state, manifest):
    ticket = Ticket("127.0.0.1", 1, manifest.run_id, new_key_pair().public)
    service = NodeService(
        ticket,
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
    yield service
    service._socket.close()


def wrong(manifest):
    return Replica(manifest, np.ones(500, np.int32), 7, bytes(16))


def test_weights_that_are_wrong_are_gone_from_disk_before_anything_else(
    service, state, manifest, monkeypatch
):
    """A kill right after the word to start over must not bring them back."""
    service._carry_out([Open(manifest)])
    state.agent(0).save(wrong(manifest), manifest)

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    monkeypatch.setattr(service._session, "opened", kill)
    with pytest.raises(Killed):
        service._carry_out([StartOver("they differ")])
    assert state.agent(0).load(manifest.run_id) is None
    assert not state.agent(0).snapshot_path.exists()


def test_after_starting_over_the_weights_are_those_of_round_0(service, state, manifest):
    service._carry_out([Open(manifest)])
    service._session.replica = wrong(manifest)
    service._carry_out([StartOver("they differ")])
    assert service._session.replica.round == 0
    assert not service._session.replica.weights.any()
    assert service.view.notice == "starting over: they differ"
    service._save()
    assert state.agent(0).load(manifest.run_id)[1].round == 0


def test_pieces_are_kept_until_the_snapshot_is_taken(service, state, manifest):
    service._carry_out([Open(manifest), Keep(bytes(16), b"abc")])
    assert bytes(state.agent(0).load_download().data) == b"abc"
    service._session.replica = wrong(manifest)
    service._carry_out([Jumped(7)])
    assert state.agent(0).load_download() is None
    assert state.agent(0).load(manifest.run_id)[1].round == 7


def test_a_snapshot_that_could_not_be_used_leaves_the_weights_alone(service, state, manifest):
    service._carry_out([Open(manifest), Keep(bytes(16), b"abc")])
    before = state.agent(0).load(manifest.run_id)
    service._carry_out([Jumped(0)])
    assert state.agent(0).load_download() is None
    assert state.agent(0).load(manifest.run_id) == before


def test_an_opened_run_has_measured_its_kernel(service, manifest):
    service._carry_out([Open(manifest)])
    assert 0 < service._session.work_per_s < 1e14
