"""Who may join: the checks on a `Hello`, each with its reason in words for the person at the node."""

from collections.abc import Callable

from coordinator.roster import Roster
from transport import hub
from transport.messages import PROTOCOL_VERSION, Hello, Refuse
from zo.manifest import MOVES, Manifest


def refusal(
    hello: Hello,
    manifest: Manifest,
    node: int | None,
    roster: Roster,
    capacity: int,
    round: int,
    head_after: Callable[[int], bytes],
) -> Refuse | None:
    """Why a node is not let in; None if it is.

    Args:
        hello: what it says of itself.
        manifest: of the run.
        node: its number, if it was admitted before.
        roster: everyone ever admitted.
        capacity: most nodes that may ever join.
        round: commits in the ledger.
        head_after: the chain's head after so many commits.
    """
    base = manifest.base
    if roster.is_quarantined(node):
        return shut_out(node)
    if hello.protocol != PROTOCOL_VERSION:
        return Refuse(
            "protocol",
            f"the coordinator speaks protocol {PROTOCOL_VERSION}, this node {hello.protocol}; update the older one",
        )
    if hello.run_id != manifest.run_id:
        return Refuse(
            "run",
            f"the ticket is for run {hello.run_id.hex()}, this coordinator serves {manifest.run_id.hex()}",
        )
    if hello.base.hex() != base.digest:
        return Refuse(
            "base",
            f"this node's base has digest {hello.base.hex()}, the run's base "
            f"{hub.spelled(base.name, base.revision)!r} has {base.digest}",
        )
    if hello.tokenizer.hex() != base.tokenizer_digest:
        return Refuse(
            "tokenizer",
            f"this node's tokenizer has digest {hello.tokenizer.hex()}, the run's has {base.tokenizer_digest}",
        )
    allowed = (*manifest.probe.estimators, *([MOVES] if manifest.moves.projections else ()))
    if hello.estimator and hello.estimator not in allowed:
        return Refuse(
            "estimator",
            f"this node measures by {hello.estimator!r}; this run allows {', '.join(allowed)}: choose one of them "
            "with --estimator",
        )
    if hello.round > round or head_after(hello.round) != hello.head:
        return Refuse(
            "fork",
            f"this node's state at round {hello.round} is not part of this ledger, which is at round {round}: the run "
            "directory was restored from an older copy, or its disk lost writes. To go on from this ledger, join with "
            "--start-over: the node's weights are set aside, not deleted",
        )
    if node is None and len(roster) >= capacity:
        return Refuse("full", f"the run has {len(roster)} nodes, its capacity is {capacity}")
    return None


def shut_out(node: int | None) -> Refuse:
    """What a node in quarantine is told."""
    return Refuse(
        "quarantined",
        f"node {node} is shut out: it differed from the ledger again after starting over, or its codes or answers "
        "were out of line. Check its memory, its disk and its data. `zo-coordinator release` lets it in again",
    )
