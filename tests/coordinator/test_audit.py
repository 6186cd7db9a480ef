"""The audit: proves a ledger that holds, and names the first round of one that does not."""

import msgspec
import pytest

from coordinator.audit import AuditError, audit
from coordinator.ledger import Checkpoint, Ledger, LedgerError
from transport.messages import PROTOCOL_VERSION, Hello, Report
from zo.commit import Revert, decode_entry
from zo.replica import Replica
from zo.steps import Scale
from zo.weights import zeros

KEY = bytes(32)
ROUNDS = 10


@pytest.fixture(params=[0, 1], ids=["", "pipelined"])
def manifest(make_manifest, request):
    return make_manifest(pipeline=request.param)


@pytest.fixture
def played(manifest, virtual_coordinator):
    """Ten rounds of one node."""
    coordinator = virtual_coordinator(manifest)
    base, tokenizer = bytes.fromhex(manifest.base.digest), bytes.fromhex(manifest.base.tokenizer_digest)
    hello = Hello(PROTOCOL_VERSION, manifest.run_id, base, tokenizer, 0, manifest.run_id, "n")
    coordinator.message(b"s", KEY, hello)
    for number in range(ROUNDS):
        coordinator.message(b"s", KEY, Report(number, bytes([number + 1, 200 + number])))
    assert len(coordinator.frames) == ROUNDS
    return coordinator


def test_a_round_that_closes_while_it_is_read_is_no_damage(manifest, played, tmp_path):
    class Served(Ledger):
        """A ledger that another process appends to, as soon as its digests have been read."""

        def checkpoints(self, *bounds):
            yield from super().checkpoints(*bounds)
            if self.num_commits() < ROUNDS:
                self.append(decode_entry(played.frames[ROUNDS - 1]))
                digest, scale = played.checkpoints[max(played.checkpoints)]
                self.checkpoint(Checkpoint(max(played.checkpoints), digest, scale))

    with Served(tmp_path / "ledger.sqlite", manifest.run_id, create=True) as ledger:
        for frame in played.frames[:-1]:
            ledger.append(decode_entry(frame))
        for number, (digest, scale) in played.checkpoints.items():
            if number < ROUNDS:
                ledger.checkpoint(Checkpoint(number, digest, scale))
        initial = Replica(manifest, zeros(manifest.adapter.size))
        assert audit(manifest, initial, ledger, lambda *_: None).rounds == ROUNDS


@pytest.fixture
def check(manifest, played, tmp_path):
    """Audit a ledger of these commits and checkpoints."""

    def run(frames=None, checkpoints=None, without=()):
        path = tmp_path / "ledger.sqlite"
        path.unlink(missing_ok=True)
        with Ledger(path, manifest.run_id, create=True) as ledger:
            for number, frame in enumerate(played.frames if frames is None else frames):
                if number not in without:
                    ledger._write(
                        "INSERT INTO commits VALUES (0, ?, ?, 0, 0, 0, x'')", number, frame
                    )  # whatever it is
            recorded = played.checkpoints if checkpoints is None else checkpoints
            for number, (digest, scale) in recorded.items():
                ledger.checkpoint(Checkpoint(number, digest, scale))
            seen = []
            initial = Replica(manifest, zeros(manifest.adapter.size))
            result = audit(manifest, initial, ledger, lambda done, total: seen.append((done, total)))
            assert seen == [(done, result.rounds) for done in range(1, result.rounds + 1)]
            return result

    return run


def rechained(frames: list[bytes], number: int, **change) -> list[bytes]:
    """The same commits, one of them changed, and the chain after it made to fit."""
    commits = [decode_entry(frame) for frame in frames]
    commits[number] = msgspec.structs.replace(commits[number], **change)
    for later in range(number + 1, len(commits)):
        commits[later] = msgspec.structs.replace(commits[later], previous=commits[later - 1].digest())
    return [commit.encode() for commit in commits]


def test_a_ledger_that_holds_is_proven(check, played, manifest):
    result = check()
    replay = played.replay()
    assert result.run == manifest.run_id.hex()
    assert (result.rounds, result.digests_proven) == (ROUNDS, 2)
    assert (result.digest, result.head) == (replay.digest().hex(), replay.head.hex())


def test_an_empty_ledger_holds(check, manifest):
    result = check(frames=[], checkpoints={})
    assert (result.rounds, result.head) == (0, manifest.run_id.hex())


@pytest.mark.parametrize("number", [0, 4, 8])
def test_a_changed_code_breaks_the_chain_at_the_next_round(check, played, number):
    frames = list(played.frames)
    commit = decode_entry(frames[number])
    frames[number] = msgspec.structs.replace(commit, codes=b"\x55" + commit.codes[1:]).encode()
    with pytest.raises(AuditError, match=f"round ({number}: step|{number + 1}: commit of round .* follows)"):
        check(frames)


def test_a_changed_code_in_a_chain_made_to_fit_fails_at_the_step_rule(check, played):
    codes = decode_entry(played.frames[5]).codes
    with pytest.raises(
        AuditError, match=r"round 5: step \d+ and exponent -?\d+ are not those of the manifest's rule"
    ):
        check(rechained(played.frames, 5, codes=b"\x55" + codes[1:]))


def test_a_code_changed_in_sign_only_fails_at_the_next_digest(check, played):
    # the step rule sees only magnitudes, so the weights' digest is what tells
    codes = decode_entry(played.frames[5]).codes
    flipped = bytes([256 - codes[0]]) + codes[1:]
    with pytest.raises(AuditError, match="round 7: the replayed weights have digest"):
        check(rechained(played.frames, 5, codes=flipped))


def test_a_changed_step_in_a_chain_made_to_fit_is_named(check, played):
    step = decode_entry(played.frames[6]).steps[0]
    with pytest.raises(AuditError, match=f"round 6: step {step + 1} and exponent .*, {step} and"):
        check(rechained(played.frames, 6, steps=(step + 1,)))


def test_a_changed_exponent_is_named(check, played):
    exponent = decode_entry(played.frames[6]).exponents[0]
    with pytest.raises(AuditError, match=f"round 6: step .* and exponent {exponent + 1} are not"):
        check(rechained(played.frames, 6, exponents=(exponent + 1,)))


@pytest.mark.parametrize("number", [0, 5])
def test_a_missing_commit_is_named(check, number):
    with pytest.raises(LedgerError, match=f"commit {number} is missing"):
        check(without=(number,))


def test_commits_cut_off_at_the_end_are_noticed_by_a_digest(check, played):
    with pytest.raises(AuditError, match="a digest is recorded for round 8, but the ledger ends at 7"):
        check(played.frames[:7])


def test_a_wrong_recorded_digest_is_named(check, played):
    (_, scale), right = played.checkpoints[8], played.checkpoints[8][0].hex()
    with pytest.raises(
        AuditError, match=f"round 7: the replayed weights have digest {right}, recorded is {'00' * 16}"
    ):
        check(checkpoints={**played.checkpoints, 8: (bytes(16), scale)})


def test_a_wrong_recorded_scale_is_named(check, played):
    digest, scale = played.checkpoints[4]
    with pytest.raises(AuditError, match="round 3: the step rule's memory is"):
        check(checkpoints={4: (digest, Scale(scale.mean_square + 1, scale.exponent))})


def test_a_recorded_digest_of_the_start_is_checked_too(check, manifest, played):
    start = Replica(manifest, zeros(manifest.adapter.size)).digest()
    scale = Scale(0, manifest.schedule.first_exponent)
    assert check(checkpoints={**played.checkpoints, 0: (start, scale)}).digests_proven == 3
    with pytest.raises(AuditError, match="the weights of round 0 have digest"):
        check(checkpoints={0: (bytes(16), scale)})


@pytest.mark.parametrize("frame", [b"", b"\x00", b"\x93\x01\x02\x03"])
def test_what_is_no_commit_is_named(check, played, frame):
    with pytest.raises(AuditError, match="round 3: not a ledger entry"):
        check([*played.frames[:3], frame, *played.frames[4:]])


def test_commits_in_another_order_are_named(check, played):
    frames = [*played.frames[:2], played.frames[3], played.frames[2], *played.frames[4:]]
    with pytest.raises(AuditError, match="round 2: commit of round 3 where round 2 is due"):
        check(frames)


def with_revert(manifest, played, **change):
    """The ten rounds, and an entry that takes back those from 6 on."""
    entries = [decode_entry(frame) for frame in played.frames]
    replica = played.replay()
    entry = replica.revert(6, 10, (), lambda first, last: entries[first:last])
    return [*played.frames, msgspec.structs.replace(entry, **change).encode()]


def test_a_ledger_with_a_revert_is_proven(check, manifest, played):
    proof = check(with_revert(manifest, played))
    assert proof.rounds == 11
    after = Replica(manifest, played.replay(6).weights, 11)
    assert proof.digest == after.digest().hex()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": bytes(16)}, "round 10: taking back rounds 6 to 9 gives digest"),
        ({"first": 5}, "round 10: taking back rounds 5 to 9 gives digest"),
        ({"nodes": (3,)}, "round 10: taking back rounds 6 to 9 gives digest"),
        ({"previous": bytes(16)}, "round 10: commit of round 10 follows 0000"),
    ],
)
def test_a_revert_that_does_not_hold_is_named(check, manifest, played, change, message):
    with pytest.raises(AuditError, match=message):
        check(with_revert(manifest, played, **change))


def test_a_revert_of_what_is_not_there_yet_is_no_entry(check, played):
    with pytest.raises(ValueError, match="cannot take back the rounds from 6 to before 11"):
        Revert(10, 6, 11, (), bytes(16), bytes(16))
    frame = msgspec.msgpack.encode((24, 10, 6, 11, (), bytes(16), bytes(16)))
    with pytest.raises(AuditError, match="round 10: not a ledger entry"):
        check([*played.frames, frame])


def test_late_codes_are_replayed_as_the_coordinator_applied_them(
    make_manifest, virtual_coordinator, tmp_path
):
    manifest = make_manifest(staleness=1)
    coordinator = virtual_coordinator(manifest)
    base, tokenizer = bytes.fromhex(manifest.base.digest), bytes.fromhex(manifest.base.tokenizer_digest)
    for node in range(2):
        hello = Hello(PROTOCOL_VERSION, manifest.run_id, base, tokenizer, 0, manifest.run_id, "n")
        coordinator.message(b"%d" % node, bytes([node] * 32), hello)
    for number in range(12):
        coordinator.now += 1.0
        coordinator.message(b"0", bytes(32), Report(number, b"\x20\xe0"))
        if len(coordinator.frames) == number:
            coordinator.tick(coordinator.conductor.wake_at())
        coordinator.message(b"1", bytes([1] * 32), Report(number, b"\x1d\xe3"))
    assert any(commit.late for commit in coordinator.commits)
    with Ledger(tmp_path / "l", manifest.run_id, create=True) as ledger:
        for frame in coordinator.frames:
            ledger.append(decode_entry(frame), frame)
        for number, (digest, scale) in coordinator.checkpoints.items():
            ledger.checkpoint(Checkpoint(number, digest, scale))
        initial = Replica(manifest, zeros(manifest.adapter.size))
        proof = audit(manifest, initial, ledger, lambda done, total: None)
    assert proof.digest == coordinator.conductor.replica.digest().hex()
    assert proof.digests_proven == 3
