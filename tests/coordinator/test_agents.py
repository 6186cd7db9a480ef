"""A run with several agents at the coordinator: tracks of their own, nodes and connections in common."""

import json
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.archive import restore
from coordinator.audit import audit
from coordinator.cli import app
from coordinator.config import ServiceConfig
from coordinator.history import HistoryError, take_back
from coordinator.rundir import RunDirectory
from coordinator.service import Service
from coordinator.status import read_status
from node.state import load_result
from transport.exits import Exit
from transport.messages import (
    PROTOCOL_VERSION,
    Finished,
    Hello,
    Identify,
    Leave,
    Progress,
    Refuse,
    Report,
    Resync,
    Welcome,
    address,
    addressed,
    decode_from_coordinator,
    encode,
)
from transport.sockets import Sent
from zo.commit import Commit, genesis
from zo.replica import Replica
from zo.weights import zeros

SIZE = 64
AGENTS = 3


class Wire:
    """The coordinator's end of the wire: takes everything, and remembers it."""

    def __init__(self):
        self.sent = []
        self.gone = set()

    def send(self, session, frame):
        if session in self.gone:
            return Sent.GONE
        agent, bare = addressed(frame)
        self.sent.append((session, agent, decode_from_coordinator(bare), len(frame)))
        return Sent.OK


class Served:
    """A run directory that is served, stopped and served again."""

    def __init__(self, path, manifest):
        self.directory = RunDirectory(path)
        self.manifest = manifest
        self.directory.create(manifest, ServiceConfig(), Replica(manifest, zeros(SIZE)))
        self.keyring = self.directory.keyring()
        for node in range(10):
            self.keyring.allow(node.to_bytes(32, "big"))
        self.ledger = None
        self.start()

    def start(self):
        """As after a SIGKILL: nothing is saved that was not."""
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = self.directory.ledger(self.manifest)
        tracks = [self.ledger.track(agent) for agent in range(self.manifest.agents.count)]
        restored = [restore(self.directory, self.manifest, track, lambda *_: None) for track in tracks]
        self.tracks, self.wire = tracks, Wire()
        self.service = Service(
            self.directory, self.manifest, ServiceConfig(), self.ledger, restored, self.wire, self.keyring
        )

    def say(self, node, agent, message, session=None):
        """(agent, message) that a node is sent in answer."""
        session, before = session or b"session %d" % node, len(self.wire.sent)
        self.service._handle(session, node.to_bytes(32, "big"), address(encode(message), agent))
        return [(a, m) for to, a, m, _ in self.wire.sent[before:] if to == session]

    def hello(self, node, agent, round=0, session=None):
        base, tokenizer = (
            bytes.fromhex(each) for each in (self.manifest.base.digest, self.manifest.base.tokenizer_digest)
        )
        head = genesis(self.manifest.run_id, agent)
        if round:
            head = self.tracks[agent].head_after(round)
        hello = Hello(PROTOCOL_VERSION, self.manifest.run_id, base, tokenizer, round, head, f"n{node}")
        return self.say(node, agent, hello, session)

    def play(self, agent, rounds, *nodes):
        for _ in range(rounds):
            round = self.service.conductors[agent].round
            for node in nodes:
                codes = np.random.default_rng([agent, round, node]).integers(-60, 60, 2).astype(np.int8)
                self.say(node, agent, Report(round % 256, codes.tobytes()))

    def audits(self):
        return [
            audit(self.manifest, self.directory.initial(self.manifest, agent), track, lambda *_: None)
            for agent, track in enumerate(self.tracks)
        ]

    def noted(self, agent, kind):
        return [event for event in self.tracks[agent].events() if event.kind == kind]


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(size=SIZE, rounds=12, digest_every=4, count=AGENTS, assignment="by-node")


@pytest.fixture
def served(tmp_path, manifest):
    served = Served(tmp_path / "run", manifest)
    yield served
    served.ledger.close()


def test_a_node_has_one_number_in_all_tracks_and_gets_the_manifest_once(served):
    ((_, first),) = served.hello(9, 1)
    ((agent, second),) = served.hello(9, 2)
    ((_, other),) = served.hello(8, 2)
    assert (first.node, second.node, other.node) == (0, 0, 1)
    assert (first.manifest, agent, second.manifest) == (served.manifest.encode(), 2, b"")
    assert other.manifest == served.manifest.encode()
    assert [[each.node for each in track.members()] for track in served.tracks] == [[], [0], [0, 1]]
    served.start()
    assert served.hello(8, 0)[0][1].node == 1
    assert served.hello(7, 0)[0][1].node == 2


def test_tracks_go_on_independently_and_each_is_proven(served):
    for agent in range(AGENTS):
        served.hello(0, agent)
    served.play(0, 12, 0)
    served.play(1, 5, 0)
    proofs = served.audits()
    assert [proof.rounds for proof in proofs] == [12, 5, 0]
    assert [proof.agent for proof in proofs] == [0, 1, 2]
    assert served.service.conductors[0].is_over
    assert not served.service.conductors.is_over
    served.start()
    assert [conductor.round for conductor in served.service.conductors] == [12, 5, 0]
    assert [c.replica.digest().hex() for c in served.service.conductors] == [proof.digest for proof in proofs]
    assert served.service.conductors.reason(0.0).startswith("agent 2, round 0: ")


def test_the_run_is_over_when_all_agents_are(served):
    for agent in range(AGENTS):
        served.hello(0, agent)
    for agent in (2, 0, 1):
        assert not served.service.conductors.is_over
        served.play(agent, 12, 0)
        assert isinstance(served.wire.sent[-1][2], Finished)
        assert served.wire.sent[-1][1] == agent
    assert served.service.conductors.is_over
    now = time.monotonic()
    for agent in range(AGENTS):
        assert served.service.conductors.owe_the_end(now)
        assert served.service.conductors.reason(now) == (
            f"agent {agent}, all rounds are done: waiting for 0 (n0) to fetch the end"
        )
        served.say(0, agent, Leave())
    assert not served.service.conductors.owe_the_end(now)
    assert served.service.conductors.reason(now) == ""


def test_who_trains_one_agent_receives_nothing_of_the_others(served):
    served.hello(0, 0)
    served.hello(1, 1)
    served.hello(2, 0)
    served.hello(2, 1)
    served.play(0, 3, 0, 2)
    served.play(1, 3, 1, 2)
    heard = {node: {a for to, a, m, _ in served.wire.sent if to == b"session %d" % node} for node in range(3)}
    assert heard == {0: {0}, 1: {1}, 2: {0, 1}}
    served.service._save_status()
    status = read_status(served.manifest, served.ledger)
    assert [[m.node for m in each.members] for each in status.agents] == [[0, 2], [1, 2], []]
    sent = {
        (node, agent): sum(n for to, a, _, n in served.wire.sent if (to, a) == (b"session %d" % node, agent))
        for node in range(3)
        for agent in range(AGENTS)
    }
    for each in status.agents:
        for member in each.members:
            assert member.payload_bytes_down == sent[member.node, each.agent] > 0
    assert [m.payload_bytes_down for m in status.members] == [
        sum(sent[node, agent] for agent in range(AGENTS)) for node in range(3)
    ]
    assert status.payload_bytes_down == sum(sent.values())


def test_an_agent_that_the_run_does_not_have_is_refused(served):
    ((agent, refuse),) = served.hello(0, 3)
    assert (agent, refuse.cause) == (3, "agent")
    assert refuse.reason == "the run has the agents 0 to 2; this node asks for 3"
    assert served.say(0, 3, Report(0, b"\x01\x02")) == []
    assert len(served.noted(0, "refused")) == 1
    assert served.ledger.nodes() == []


def test_a_track_in_which_a_session_has_not_greeted_asks_who_it_is(served):
    served.hello(0, 1)
    assert served.say(0, 2, Report(0, b"\x01\x02")) == [(2, Identify())]


def test_a_new_process_with_the_same_key_closes_the_old_one_in_every_track(served):
    for agent in range(AGENTS):
        served.hello(0, agent)
    ((_, welcome),) = served.hello(0, 1, session=b"new")
    assert isinstance(welcome, Welcome)
    refused = [(a, m.cause) for to, a, m, _ in served.wire.sent if isinstance(m, Refuse)]
    assert sorted(refused) == [(0, "replaced"), (1, "replaced"), (2, "replaced")]
    assert served.service.conductors.member_of(b"session 0") is None
    assert [bool(c.present) for c in served.service.conductors] == [False, True, False]
    served.hello(0, 2, session=b"new")
    assert [bool(c.present) for c in served.service.conductors] == [False, True, True]


def test_a_connection_that_is_lost_is_lost_in_all_tracks(served):
    for agent in range(AGENTS):
        served.hello(0, agent)
    served.hello(1, 1)
    served.wire.gone.add(b"session 0")
    served.play(1, 1, 0, 1)
    assert [[m.node for m in c.present] for c in served.service.conductors] == [[], [1], []]
    assert [len(served.noted(agent, "lost")) for agent in range(AGENTS)] == [1, 1, 1]


def test_who_speaks_in_one_track_is_not_gone_in_another(served):
    served.hello(0, 0)
    served.hello(0, 1)
    conductors, now = served.service.conductors, 10_000_000.0
    conductors.on_message(b"session 0", bytes(32), 0, Progress(0, zeros_digest(served, 0), None), now)
    assert conductors.on_tick(now + 1) == []
    assert [len(c.present) for c in conductors] == [1, 1, 0]


def zeros_digest(served, agent):
    return Replica(served.manifest, zeros(SIZE), agent=agent).digest()


def test_a_quarantine_is_of_all_tracks(served):
    for agent in range(AGENTS):
        served.hello(0, agent)
    served.play(1, 4, 0)
    for _ in range(2):
        assert any(isinstance(m, Resync) for _, m in served.say(0, 1, Progress(4, bytes(16), None)))
        served.hello(0, 1)
    # Where it was not found out it is shut out with the next that it says.
    rounds = served.service.conductors[0].round
    codes = np.ones(2, np.int8).tobytes()
    assert [m.cause for _, m in served.say(0, 0, Report(rounds % 256, codes))] == ["quarantined"]
    assert served.service.conductors[0].round == rounds
    assert not served.service.conductors[0].present
    assert served.hello(0, 2)[-1][1].cause == "quarantined"
    served.start()
    assert served.hello(0, 0)[-1][1].cause == "quarantined"
    served.service._save_status()
    assert read_status(served.manifest, served.ledger).members[0].quarantined


def test_codes_of_a_node_that_is_found_out_in_one_track_count_in_no_other(served):
    for agent in range(2):
        for node in range(2):
            served.hello(node, agent)
        served.play(agent, 4, 0, 1)
    round, codes = served.service.conductors[0].round, np.ones(2, np.int8).tobytes()
    served.say(0, 0, Report(round % 256, codes))
    for _ in range(2):
        served.say(0, 1, Progress(4, bytes(16), None))
        served.hello(0, 1)
    assert served.service.conductors[0].round == round  # it waits for node 1, and for nobody else
    served.say(1, 0, Report(round % 256, codes))
    (commit,) = served.tracks[0].entries(round)
    assert commit.participants == (1,)


def test_counts_and_losses_of_each_agent_go_on_over_restarts(served):
    served.hello(0, 0)
    served.hello(0, 1)
    served.play(0, 4, 0)
    served.play(1, 8, 0)
    served.say(0, 0, Progress(4, served.tracks[0].digest_at(4), 3000))
    served.say(0, 1, Progress(8, served.tracks[1].digest_at(8), 2000))
    served.service._save_status()
    before = served.service.status
    assert (before.loss, [each.loss for each in before.agents]) == (2.5, [3.0, 2.0, None])
    assert (before.round, [each.round for each in before.agents]) == (0, [4, 8, 0])
    assert before.digest == served.tracks[0].digest_at(4).hex()
    served.start()
    served.service._save_status()
    after = served.service.status
    assert [each.loss for each in after.agents] == [3.0, 2.0, None]
    assert after.payload_bytes_up == before.payload_bytes_up > 0
    assert [m.payload_bytes_down for m in after.agents[1].members] == [
        m.payload_bytes_down for m in before.agents[1].members
    ]


def test_a_commit_follows_its_own_chain_and_snapshots_are_each_agents(served):
    for agent in range(AGENTS):
        served.hello(0, agent)
        served.play(agent, 3 + agent, 0)
    heads = [next(track.entries()).previous for track in served.tracks]
    assert heads == [genesis(served.manifest.run_id, agent) for agent in range(AGENTS)]
    served.service._save_snapshots()
    assert [served.directory.snapshots(a).stored()[-1].round for a in range(AGENTS)] == [3, 4, 5]
    for agent, track in enumerate(served.tracks):
        replica, origin = served.directory.newest(served.manifest, track)
        assert (replica.agent, origin) == (agent, f"snapshot of round {3 + agent}")


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def played(served):
    """Node 0 trains all agents, node 1 the last alone; stopped."""
    for agent in range(AGENTS):
        served.hello(0, agent)
    served.hello(1, 2)
    served.play(0, 6, 0)
    served.play(1, 8, 0)
    served.play(2, 7, 0, 1)
    served.service._save_snapshots()
    served.service.close()
    return served


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments):
    result = run(*arguments)
    assert result.exit_code == Exit.INPUT, result.output
    return " ".join(result.stderr.split())


def test_verify_proves_every_agent(played):
    text = succeeds("verify", played.directory.path)
    for agent, rounds in enumerate((6, 8, 7)):
        assert f"agent {agent} verified: {rounds} commits" in text
    proofs = [json.loads(line) for line in succeeds("verify", played.directory.path, "--json").splitlines()]
    assert [(proof["agent"], proof["rounds"]) for proof in proofs] == [(0, 6), (1, 8), (2, 7)]
    assert [proof["digest"] for proof in proofs] == [proof.digest for proof in played.audits()]


def test_status_shows_every_agent(played):
    text = succeeds("status", played.directory.path)
    for agent, digest in enumerate(proof.digest for proof in played.audits()):
        assert any(line.split()[0] == str(agent) and digest in line for line in text.splitlines() if line)
    status = json.loads(succeeds("status", played.directory.path, "--json"))
    assert [each["round"] for each in status["agents"]] == [6, 8, 7]
    assert status["round"] == 6
    assert [member["node"] for member in status["members"]] == [0, 1]


def test_log_and_rollback_need_an_agent(played):
    path = played.directory.path
    expected = "the run has the agents 0 to 2, each with rounds of its own: name one with --agent"
    assert expected in fails("log", path)
    assert expected in fails("rollback", path, "--to", 2)
    assert "the run has the agents 0 to 2, got --agent 3" in fails("log", path, "--agent", 3)
    records = [json.loads(line) for line in succeeds("log", path, "--agent", 2, "--json").splitlines()]
    assert [record["round"] for record in records if record["kind"] == "commit"] == list(range(7))
    assert {record["node"] for record in records if record["kind"] == "joined"} == {0, 1}


def test_a_rollback_is_one_agents(played):
    before = [proof.digest for proof in played.audits()]
    assert "agent 1, round 8: took back rounds 2 to 7" in succeeds(
        "rollback", played.directory.path, "--to", 2, "--agent", 1
    )
    proofs = played.audits()
    assert [proof.rounds for proof in proofs] == [6, 9, 7]
    assert [proofs[agent].digest for agent in (0, 2)] == [before[agent] for agent in (0, 2)]
    replica, at_2 = (played.directory.state_at(round, played.manifest, played.tracks[1]) for round in (9, 2))
    assert np.array_equal(replica.weights, at_2.weights)


def test_a_retraction_is_from_all_agents_that_the_node_trained(played):
    text = succeeds("retract", played.directory.path, 1)
    assert "agent 2, round 7: took back rounds 0 to 6 of node 1" in text
    assert "agent 0" not in text
    assert [proof.rounds for proof in played.audits()] == [6, 8, 8]
    succeeds("retract", played.directory.path, 0)
    assert [proof.rounds for proof in played.audits()] == [7, 9, 9]
    for agent, track in enumerate(played.tracks):
        rounds = track.num_commits()
        assert not played.directory.state_at(rounds, played.manifest, track).weights.any(), agent
    assert "no node 7 has ever joined" in fails("retract", played.directory.path, 7)
    with pytest.raises(HistoryError, match="took part in no round"):
        take_back(played.directory, played.manifest, played.tracks[0], 0, [1])


def test_an_export_holds_all_agents_or_one(played, tmp_path):
    path = played.directory.path
    assert "agent 1, round 5" in succeeds("export", path, "--round", 5, "-o", tmp_path / "all")
    for agent, track in enumerate(played.tracks):
        replica = load_result(tmp_path / "all", agent)[1]
        expected = played.directory.state_at(5, played.manifest, track)
        assert (replica.agent, replica.round, replica.digest()) == (agent, 5, expected.digest())
    succeeds("export", path, "--agent", 2, "-o", tmp_path / "one")
    assert load_result(tmp_path / "one", 2)[1].round == 7
    assert not (tmp_path / "one" / "snapshot.zo").exists()
    assert "the ledger of agent 0 has 6 rounds, got --round 7" in fails(
        "export", path, "--round", 7, "-o", tmp_path / "no"
    )


def test_a_backup_has_all_agents_and_equals_its_original(played, tmp_path):
    succeeds("backup", played.directory.path, tmp_path / "copy")
    text = succeeds("diff", played.directory.path, tmp_path / "copy")
    assert text.splitlines() == [
        f"agent {agent}, equal: {rounds} rounds" for agent, rounds in enumerate((6, 8, 7))
    ]
    copy = RunDirectory(tmp_path / "copy")
    for agent in range(AGENTS):
        assert copy.snapshots(agent).stored() == played.directory.snapshots(agent).stored() != []
    succeeds("rollback", tmp_path / "copy", "--to", 3, "--agent", 2)
    result = run("diff", played.directory.path, tmp_path / "copy")
    assert result.exit_code == Exit.MISMATCH
    assert result.stdout.splitlines()[2] == "agent 2, equal up to round 7; B has 1 more"
    succeeds("diff", played.directory.path, tmp_path / "copy", "--agent", 1)


def test_entries_of_agents_do_not_mix(played):
    for agent, track in enumerate(played.tracks):
        entries = list(track.entries())
        assert all(isinstance(entry, Commit) for entry in entries)
        assert entries[-1].participants == ((0, 1) if agent == 2 else (0,))
        assert track.checkpoints() is not None
        assert {checkpoint.round for checkpoint in track.checkpoints()} == {4} | (
            {8} if agent == 1 else set()
        )
