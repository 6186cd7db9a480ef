"""The audit: replays a ledger from its first commit and proves, or refutes, everything that it claims."""

import contextlib
from collections.abc import Callable

import msgspec

from coordinator.ledger import Ledger, LedgerError
from zo.commit import Commit, decode_entry
from zo.manifest import Manifest
from zo.packing import by_class
from zo.replica import Replica
from zo.steps import step_rule


class AuditError(RuntimeError):
    """A ledger that does not prove what it claims; the message names the first round at which."""


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay of one agent's chain proved."""

    run: str
    agent: int
    rounds: int
    """Commits replayed."""
    digests_proven: int
    """Recorded digests that the replay reproduced."""
    digest: str
    """Digest of the final weights."""
    head: str
    """Digest of the last commit, which stands for the whole chain."""


def audit(
    manifest: Manifest, initial: Replica, ledger: Ledger, progress: Callable[[int, int], None]
) -> Audit:
    """Replay an agent's whole ledger: the chain, every signature, every step by the manifest's rule,
    every recorded digest and scale.

    Args:
        manifest: of the run.
        initial: the agent's weights of round 0; moved on by the replay.
        ledger: the agent's.
        progress: called with (commits replayed, commits in all).

    Raises:
        AuditError: something does not hold.
        LedgerError: the file is damaged.
    """
    # First the digests: a coordinator that serves meanwhile then has no commit less than they are of.
    recorded = {checkpoint.round: checkpoint for checkpoint in ledger.checkpoints()}
    total = ledger.num_commits()
    rule = step_rule(manifest)
    scale = rule.start()
    proven = 0
    start = recorded.pop(initial.round, None)
    if start is not None:
        if start.digest != initial.digest():
            raise AuditError(
                f"the weights of round 0 have digest {initial.digest().hex()}, recorded is {start.digest.hex()}"
            )
        proven += 1
    with contextlib.closing(ledger.frames(0, total)) as frames:
        for number, frame in enumerate(frames):
            try:
                ledger.check_seal(manifest.run.signer, number + 1)
                entry = decode_entry(frame)
                initial.apply(entry, frame, ledger.entries)
            except (ValueError, ArithmeticError, LedgerError) as error:
                raise AuditError(f"round {number}: {error}") from error
            if isinstance(entry, Commit):
                steps, scale = rule.of_round(scale, number, *by_class(entry, manifest))
                exponents = rule.exponents(scale)
                if entry.steps != steps or entry.exponents != exponents:
                    raise AuditError(
                        f"round {number}: step {_listed(entry.steps)} and exponent {_listed(entry.exponents)} are not "
                        f"those of the manifest's rule, {_listed(steps)} and {_listed(exponents)}"
                    )
            checkpoint = recorded.pop(initial.round, None)
            if checkpoint is not None:
                if checkpoint.digest != initial.digest():
                    raise AuditError(
                        f"round {number}: the replayed weights have digest {initial.digest().hex()}, "
                        f"recorded is {checkpoint.digest.hex()}"
                    )
                memory = msgspec.structs.replace(scale, ahead=())  # commits say that, and were compared
                if checkpoint.scale != memory:
                    raise AuditError(
                        f"round {number}: the step rule's memory is {memory}, recorded is {checkpoint.scale}"
                    )
                proven += 1
            progress(initial.round, total)
    if recorded:
        raise AuditError(f"a digest is recorded for round {min(recorded)}, but the ledger ends at {total}")
    return Audit(
        run=manifest.run_id.hex(),
        agent=ledger.agent,
        rounds=total,
        digests_proven=proven,
        digest=initial.digest().hex(),
        head=initial.head.hex(),
    )


def _listed(numbers: tuple[int, ...]) -> str:
    """One for each class of codes."""
    return ", ".join(map(str, numbers))
