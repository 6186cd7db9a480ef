"""What strangers and members can make the coordinator decide: nothing but what is their own."""

import string

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.config import ServiceConfig
from transport.messages import (
    MAX_NODE_FRAME_BYTES,
    PROTOCOL_VERSION,
    Answer,
    Fetch,
    Follow,
    FromMember,
    FromNode,
    Hello,
    Identify,
    Leave,
    Progress,
    Redeem,
    Refuse,
    Report,
    Rotate,
    Trace,
    WireError,
    addressed,
    decode_from_coordinator,
    decode_from_node,
    encode,
)
from zo.commit import decode_entry

pytestmark = pytest.mark.attack

DIGESTS = st.binary(min_size=16, max_size=16)
ROUNDS = st.one_of(st.integers(0, 12), st.integers(0, 2**40))
MESSAGES = {
    Hello: st.builds(
        Hello,
        st.sampled_from([PROTOCOL_VERSION, 0, 65535]),
        DIGESTS,
        DIGESTS,
        DIGESTS,
        ROUNDS,
        DIGESTS,
        st.text(max_size=64),
    ),
    Report: st.builds(Report, st.integers(0, 255), st.binary(min_size=1, max_size=4096)),
    Progress: st.builds(Progress, ROUNDS, DIGESTS, st.none() | st.integers(0, 2**32)),
    Answer: st.builds(Answer, ROUNDS, st.binary(min_size=8, max_size=8)),
    Leave: st.builds(Leave),
    Fetch: st.builds(Fetch, DIGESTS, st.integers(0, 2**40)),
    Follow: st.builds(Follow, ROUNDS, DIGESTS),
    Trace: st.builds(Trace, ROUNDS, st.lists(DIGESTS, max_size=128).map(tuple)),
}
ANY_MESSAGE = st.one_of(*MESSAGES.values())
KEYS = st.binary(min_size=32, max_size=32)
ABOUT_KEYS = {Redeem: st.builds(Redeem, DIGESTS, KEYS), Rotate: st.builds(Rotate, KEYS)}
"""For the service and its keyring alone: no conductor sees them."""


def key_of(node):
    return node.to_bytes(32, "big")


def session_of(node):
    return b"session %d" % node


class Run:
    """A run of two honest nodes, some rounds old, and the attacker's words."""

    def __init__(self, coordinator, num_rounds=5):
        self.coordinator, self.manifest = coordinator, coordinator.manifest
        for node in (0, 1):
            self.say(node, self.hello())
        for _ in range(num_rounds):
            self.play()

    def hello(self, **change):
        base, tokenizer = (
            bytes.fromhex(each) for each in (self.manifest.base.digest, self.manifest.base.tokenizer_digest)
        )
        hello = Hello(
            PROTOCOL_VERSION, self.manifest.run_id, base, tokenizer, 0, self.manifest.run_id, "honest"
        )
        return msgspec.structs.replace(hello, **change)

    def say(self, node, message, session=None, key=None):
        return self.coordinator.message(session or session_of(node), key or key_of(node), message)

    def report(self, node, codes=b"\x10\xf0", round=None):
        number = self.coordinator.conductor.round if round is None else round
        return self.say(node, Report(number % 256, codes))

    def play(self):
        self.report(0)
        self.report(1)

    def durable(self):
        """Everything that must not change."""
        coordinator = self.coordinator
        return list(coordinator.frames), dict(coordinator.enrolled), dict(coordinator.checkpoints)

    def in_memory(self):
        """What grows, if anything does."""
        conductor = self.coordinator.conductor
        return len(conductor.members), len(conductor._node_by_session), len(conductor._opened_at)


@pytest.fixture
def run(make_manifest, virtual_coordinator):
    return Run(virtual_coordinator(make_manifest(rounds=1000), ServiceConfig(quorum=2)))


def test_every_message_type_is_fuzzed():
    assert set(MESSAGES) == set(FromMember.__args__)
    assert set(ABOUT_KEYS) | set(MESSAGES) == set(FromNode.__args__)


def test_the_right_key_for_another_run_is_refused(run):
    before = run.durable()
    (refuse,) = run.say(7, run.hello(run_id=bytes(16)))
    assert (type(refuse), refuse.cause) == (Refuse, "run")
    assert run.durable() == before


def test_a_replayed_report_counts_once(run):
    run.report(0, b"\x01\x02")
    for _ in range(10):
        assert run.report(0, b"\x7f\x7f") == []
    run.report(1)
    commit = decode_entry(run.coordinator.frames[-1])
    assert commit.codes == b"\x01\x02\x10\xf0"
    rounds = run.coordinator.conductor.round
    for round in range(rounds - 5, rounds):  # and of the rounds before, not at all
        run.report(0, b"\x7f\x7f", round=round)
    run.play()
    assert decode_entry(run.coordinator.frames[-1]).codes == b"\x10\xf0\x10\xf0"


def test_a_report_counts_for_the_node_whose_key_sent_it(run):
    """There is no field for somebody else's number: a report is that of its connection's key."""
    assert "node" not in Report.__struct_fields__
    run.report(1, b"\x05\x06")
    (answer,) = run.say(1, Report(run.coordinator.conductor.round, b"\x7f\x7f"), session=session_of(0))
    assert answer == Identify()  # the session of node 0, with the key of node 1
    run.report(0, b"\x07\x08")
    assert decode_entry(run.coordinator.frames[-1]).codes == b"\x07\x08\x05\x06"


def test_a_stolen_session_is_worth_nothing_without_its_key(run):
    before = run.durable()
    for message in (Leave(), Progress(3, bytes(16), None), Follow(0, bytes(16)), Trace(0, (bytes(16),))):
        answers = run.say(9, message, session=session_of(0))
        assert answers in ([], [Identify()])
    assert run.durable() == before
    assert run.coordinator.conductor.members[0].session == session_of(0)
    run.play()
    assert decode_entry(run.coordinator.frames[-1]).participants == (0, 1)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_junk_is_a_wire_error_and_nothing_else(data):
    for decode in (decode_from_node, decode_from_coordinator):
        try:
            message = decode(data)
        except WireError:
            continue
        assert decode(encode(message)) == message


@settings(max_examples=300)
@given(st.one_of(ANY_MESSAGE, *ABOUT_KEYS.values()).map(encode), st.data())
def test_a_message_with_changed_bytes_is_a_message_or_a_wire_error(frame, data):
    frame = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(frame) - 1))
        frame[position] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    for each in (bytes(frame), cut):
        try:
            agent, bare = addressed(each)
            decode_from_node(bare)
            assert agent >= 0
        except WireError:
            pass


def test_a_frame_over_the_limit_is_not_even_read():
    with pytest.raises(WireError, match=f"a node's may have {MAX_NODE_FRAME_BYTES}"):
        decode_from_node(encode(Trace(0, (bytes(16),))) + bytes(MAX_NODE_FRAME_BYTES))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(ANY_MESSAGE, min_size=1, max_size=30))
def test_a_stranger_changes_nothing_whatever_it_says(make_manifest, virtual_coordinator, messages):
    """A stranger's `Hello` does not fit the run here; without one it is asked for it, and no more."""
    run = Run(virtual_coordinator(make_manifest(rounds=1000), ServiceConfig(quorum=2)), num_rounds=1)
    before, memory = run.durable(), run.in_memory()
    for message in messages:
        for answer in run.say(9, message):
            assert isinstance(answer, (Identify, Refuse))
    assert (run.durable(), run.in_memory()) == (before, memory)
    run.play()
    assert decode_entry(run.coordinator.frames[-1]).participants == (0, 1)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(ANY_MESSAGE, min_size=1, max_size=30))
def test_a_member_changes_nothing_but_its_own_codes(make_manifest, virtual_coordinator, messages):
    """Whatever a member says, the others are not disturbed, and no round counts it more than once."""
    run = Run(virtual_coordinator(make_manifest(rounds=1000), ServiceConfig(quorum=2)), num_rounds=1)
    run.say(2, run.hello())
    frames, memory = run.durable()[0], run.in_memory()
    for message in messages:
        run.say(2, message)
    assert run.durable()[0][: len(frames)] == frames
    assert all(after <= before for after, before in zip(run.in_memory(), memory, strict=True))
    run.coordinator.now += 1000.0  # nobody waits for ever
    run.play()
    run.coordinator.tick(run.coordinator.now + 1000.0)
    commit = decode_entry(run.coordinator.frames[-1])
    assert set(commit.participants) >= {0, 1}
    assert len(commit.codes) == 2 * len(commit.participants)


@given(st.text(alphabet=string.printable + "\x1b\u202e", max_size=64))
def test_a_name_is_shown_without_what_a_terminal_would_obey(name):
    from coordinator.display import plain

    assert all(letter.isprintable() for letter in plain(name).plain)
