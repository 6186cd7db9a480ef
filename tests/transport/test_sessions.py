"""The sessions of a node: who greets when, whose turn it is, and when all is over."""

import numpy as np
import pytest

from transport.exits import Exit
from transport.messages import (
    PROTOCOL_VERSION,
    Finished,
    Hello,
    Leave,
    Progress,
    Refuse,
    Report,
    Welcome,
)
from transport.session import End, Open, Session, Stage, Transmit
from transport.sessions import AssignmentError, Sessions, assigned
from zo.commit import Commit, genesis
from zo.replica import Replica
from zo.weights import zeros

CODES = np.array([3, -4], np.int8)


class Node:
    """A node without a service: it opens every agent with zeros."""

    def __init__(self, manifest, named=None, saved=None):
        self.manifest = manifest
        self.saved = saved or {}
        self.made = []
        self.sent = []
        self.end = None
        self.sessions = Sessions(named, self.make)

    def make(self, agent):
        self.made.append(agent)
        saved = self.saved.get(agent)
        base, tokenizer = (
            bytes.fromhex(each) for each in (self.manifest.base.digest, self.manifest.base.tokenizer_digest)
        )
        return Session(self.manifest.run_id, base, tokenizer, "n", saved, agent=agent)

    def do(self, effects):
        """What is sent, by agent."""
        before = len(self.sent)
        opened = len(self.sessions.by_agent) > 1
        for agent, effect in effects:
            match effect:
                case Transmit(message):
                    self.sent.append((agent, message))
                case Open(manifest):
                    if self.sessions.by_agent[agent].replica is None:
                        replica = Replica(manifest, zeros(500), agent=agent)
                        self.do(self.sessions.opened(agent, replica, 0.0))
                    if not opened:
                        self.do(self.sessions.on_manifest(manifest))
                case End():
                    self.end = effect
        return self.sent[before:]

    def welcome(self, agent, manifest=True, round=0):
        data = self.manifest.encode() if manifest else b""
        message = Welcome(PROTOCOL_VERSION, 5, data, round, -4, None)
        return self.do(self.sessions.on_message(agent, message, 0.0))

    def join(self):
        """Greet and be welcomed, in all tracks."""
        self.do(self.sessions.on_link_up())
        (first, *_) = self.sessions.by_agent
        for agent, _ in self.welcome(first):
            self.welcome(agent, manifest=False)
        return self

    def probe(self):
        """Probe whose turn it is, and say who it was."""
        agent, round, _ = self.sessions.next_probe()
        self.do(self.sessions.on_probed(agent, round, CODES, 3.0, 0.0))
        return agent

    def commit(self, agent):
        replica = self.sessions.by_agent[agent].replica
        commit = Commit(replica.round, (1000,), (-4,), (5,), CODES.tobytes(), replica.head)
        return self.do(self.sessions.on_message(agent, commit, 0.0))


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(rounds=2, digest_every=64, count=3)


@pytest.fixture
def by_node(make_manifest):
    return make_manifest(rounds=2, digest_every=64, count=3, assignment="by-node")


def test_a_run_with_one_agent_is_one_session(make_manifest):
    node = Node(make_manifest()).join()
    assert list(node.sessions.by_agent) == [0]
    assert node.probe() == 0
    assert node.sessions.next_probe() is None


def test_the_first_greets_alone_and_the_others_once_the_manifest_is_there(manifest):
    node = Node(manifest)
    ((agent, hello),) = node.do(node.sessions.on_link_up())
    assert (agent, type(hello), hello.head) == (0, Hello, manifest.run_id)
    others = node.welcome(0)
    assert [(agent, type(message)) for agent, message in others] == [(1, Hello), (2, Hello)]
    assert [message.head for _, message in others] == [genesis(manifest.run_id, agent) for agent in (1, 2)]
    assert node.made == [0, 1, 2]


def test_a_node_greets_for_the_agents_that_it_named_and_no_others(by_node):
    node = Node(by_node, named=[2, 1])
    ((agent, _),) = node.do(node.sessions.on_link_up())
    assert agent == 1
    assert [agent for agent, _ in node.welcome(1)] == [2]
    node.welcome(2, manifest=False)
    assert node.sessions.on_message(0, Refuse("run", "about an agent of others"), 0.0) == []
    assert node.sessions.node == 5


def test_all_greet_at_once_on_a_new_connection(manifest):
    node = Node(manifest).join()
    node.sessions.on_link_down()
    assert node.sessions.stage is Stage.CONNECTING
    sent = node.do(node.sessions.on_link_up())
    assert [(agent, type(message)) for agent, message in sent] == [(0, Hello), (1, Hello), (2, Hello)]


def test_the_others_wait_for_the_next_connection_if_this_one_is_lost_meanwhile(manifest):
    node = Node(manifest)
    node.do(node.sessions.on_link_up())
    effects = node.sessions.on_message(0, Welcome(PROTOCOL_VERSION, 5, manifest.encode(), 0, -4, None), 0.0)
    node.sessions.on_link_down()
    assert [message for _, message in node.do(effects) if isinstance(message, Hello)] == []
    assert [agent for agent, _ in node.do(node.sessions.on_link_up())] == [0, 1, 2]


def test_agents_that_are_ready_take_turns(manifest):
    node = Node(manifest).join()
    assert [node.probe() for _ in range(3)] == [0, 1, 2]
    assert node.sessions.next_probe() is None
    for agent in (2, 0):
        node.commit(agent)
    assert node.probe() == 0
    node.commit(1)
    assert [node.probe(), node.probe()] == [1, 2]
    reports = [(agent, message.round) for agent, message in node.sent if isinstance(message, Report)]
    assert reports == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_an_agent_that_is_always_ready_does_not_starve_the_others(make_manifest):
    node = Node(make_manifest(rounds=50, digest_every=64, count=2)).join()
    turns = []
    for _ in range(20):
        turns.append(node.probe())
        node.commit(turns[-1])
    assert turns == [0, 1] * 10


def test_weights_of_agents_differ_after_the_same_codes(manifest):
    node = Node(manifest).join()
    for _ in range(3):
        node.commit(node.probe())
    weights = [session.replica.weights for session in node.sessions.by_agent.values()]
    assert not np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[1], weights[2])


def test_a_node_ends_when_all_its_agents_are_done(by_node):
    node = Node(by_node, named=[0, 2]).join()
    for _ in range(4):
        node.commit(node.probe())
    for agent in (2, 0):
        assert node.end is None
        digest = node.sessions.by_agent[agent].replica.digest()
        sent = node.do(node.sessions.on_message(agent, Finished(2, digest), 0.0))
        assert [(a, type(message)) for a, message in sent] == [(agent, Progress), (agent, Leave)]
    assert node.end.code is Exit.OK
    digests = [node.sessions.by_agent[agent].replica.digest().hex() for agent in (0, 2)]
    assert node.end.reason.splitlines() == [
        f"agent {agent}: all 2 rounds are done, digest {digest}, equal to the coordinator's"
        for agent, digest in zip((0, 2), digests, strict=True)
    ]


def test_what_ends_one_agent_badly_ends_the_node(manifest):
    node = Node(manifest).join()
    node.do(node.sessions.on_message(1, Refuse("quarantined", "check its memory"), 0.0))
    assert node.end == End(Exit.REFUSED, "check its memory")
    node = Node(manifest)
    node.do(node.sessions.on_link_up())
    node.do(node.sessions.on_message(0, Refuse("agent", "there is no such agent"), 0.0))
    assert node.end == End(Exit.INPUT, "there is no such agent")


def test_leaving_is_said_for_every_agent(manifest):
    node = Node(manifest).join()
    assert node.do(node.sessions.leave()) == [(agent, Leave()) for agent in range(3)]
    assert node.sessions.stage is Stage.ENDED


def test_each_agent_goes_on_from_what_was_saved_of_it(manifest):
    saved = {1: (manifest, Replica(manifest, zeros(500), 1, bytes(16), agent=1))}
    node = Node(manifest, saved=saved)
    node.do(node.sessions.on_link_up())
    hellos = dict(node.welcome(0))
    assert (hellos[1].round, hellos[1].head) == (1, bytes(16))
    assert hellos[2].round == 0
    assert node.sessions.round == 0


def test_losses_are_means_and_what_is_behind_is_a_sum(manifest):
    node = Node(manifest)
    assert (node.sessions.loss, node.sessions.behind) == (None, 0)
    node.do(node.sessions.on_link_up())
    node.welcome(0, round=2)
    node.welcome(1, manifest=False)
    node.welcome(2, manifest=False, round=1)
    assert node.sessions.behind == 3
    node.probe()
    node.sessions.by_agent[2].loss = 5.0
    assert node.sessions.loss == 4.0


@pytest.mark.parametrize(
    ("assignment", "count", "named", "words"),
    [
        ("by-node", 4, None, "this run has 4 agents, 0 to 3, and every node names those that it trains"),
        ("by-node", 4, [1, 7, 9], "this run has 4 agents, 0 to 3, got --agents 7,9"),
        ("all", 4, [1], "every node trains every agent"),
        ("all", 1, [0], "it has one agent, 0"),
    ],
)
def test_an_assignment_that_does_not_fit_says_what_would(make_manifest, assignment, count, named, words):
    with pytest.raises(AssignmentError, match=words):
        assigned(make_manifest(count=count, assignment=assignment), named)


def test_an_assignment_is_ascending_and_names_each_agent_once(make_manifest):
    by_node = make_manifest(count=4, assignment="by-node")
    assert assigned(by_node, [3, 1, 3]) == (1, 3)
    assert assigned(make_manifest(count=4), None) == (0, 1, 2, 3)
