"""One round: who has reported, and whether it is over. Pure; time is an argument, the reason is text for the log."""

import enum
from collections.abc import Mapping

import msgspec


class Verdict(enum.Enum):
    """What became of a report."""

    COUNTED = "counted"
    DUPLICATE = "counted before"
    COUNTED_LATE = "counted in the round after its own"
    EARLY = "kept for the next round"
    LATE = "its round is closed"


class Outcome(enum.Enum):
    """What to do with a round now."""

    WAIT = "wait"
    CLOSE = "close"


class Round(msgspec.Struct, frozen=True):
    """A round in progress."""

    number: int
    opened_at_s: float
    codes_by_node: Mapping[int, bytes] = {}
    """int8 each, unpacked."""
    late_by_node: Mapping[int, bytes] = {}
    """Codes for the round before, of nodes that have not reported for this one."""
    may_be_late: frozenset[int] = frozenset()
    """Nodes whose report for the round before would still count: the manifest allows it, and it did not count there."""
    early_by_node: Mapping[int, bytes] = {}
    """Codes for the round after, of nodes of a pipelined run."""


def receive(collection: Round, node: int, number: int, codes: bytes) -> tuple[Round, Verdict, str]:
    """The round after a report; the report's own round `number` may be another. The first report stands.

    Args:
        collection: the round in progress.
        node: who reports.
        number: the round the report is for; never past the one in progress, since nobody can know that one, or in a
            pipelined run the one after it.
        codes: its codes, int8 each: as many as the manifest asks for.
    """
    if number == collection.number + 1:
        if node in collection.early_by_node:
            return collection, Verdict.DUPLICATE, f"round {number}: node {node} reported before"
        early = {**collection.early_by_node, node: codes}
        return msgspec.structs.replace(collection, early_by_node=early), Verdict.EARLY, ""
    if number != collection.number:
        reason = f"round {number}: report of node {node} came in round {collection.number}"
        is_taken = node in collection.codes_by_node or node in collection.late_by_node
        if number == collection.number - 1 and node in collection.may_be_late and not is_taken:
            late = {**collection.late_by_node, node: codes}
            return msgspec.structs.replace(collection, late_by_node=late), Verdict.COUNTED_LATE, reason
        return collection, Verdict.LATE, reason
    if node in collection.codes_by_node:
        return collection, Verdict.DUPLICATE, f"round {number}: node {node} reported before"
    # One set of codes a node and round: fresh ones are worth more than late ones.
    late = {other: each for other, each in collection.late_by_node.items() if other != node}
    reports = {**collection.codes_by_node, node: codes}
    return (
        msgspec.structs.replace(collection, codes_by_node=reports, late_by_node=late),
        Verdict.COUNTED,
        "",
    )


def withdraw(collection: Round, node: int) -> Round:
    """The round without what a node reported for it, or for the next one."""
    return msgspec.structs.replace(
        collection,
        codes_by_node=_without(node, collection.codes_by_node),
        late_by_node=_without(node, collection.late_by_node),
        early_by_node=_without(node, collection.early_by_node),
    )


def _without(node: int, codes_by_node: Mapping[int, bytes]) -> dict[int, bytes]:
    return {other: codes for other, codes in codes_by_node.items() if other != node}


def following(closed: Round, opened_at_s: float, may_be_late: frozenset[int] = frozenset()) -> Round:
    """The round after one that was closed, with the reports that came for it already.

    Args:
        closed: the round before.
        opened_at_s: now, in seconds.
        may_be_late: of the new round.
    """
    return Round(closed.number + 1, opened_at_s, closed.early_by_node, may_be_late=may_be_late)


def decide(
    collection: Round, awaited: frozenset[int], quorum: int, wait_s: float, now: float
) -> tuple[Outcome, str]:
    """Whether the round is over, and the reason in words fit for the log.

    It closes when a quorum has reported and nobody who is awaited is missing, or `wait_s` has passed.

    Args:
        collection: the round.
        awaited: nodes that the round waits for.
        quorum: least number of reports.
        wait_s: how long after its opening, in seconds, a quorum is enough.
        now: in seconds, on the clock of `opened_at_s`.
    """
    reported = len(collection.codes_by_node)
    missing = sorted(awaited - collection.codes_by_node.keys())
    counts = f"{reported} of {len(awaited | collection.codes_by_node.keys())} reported, quorum {quorum}"
    if reported < quorum:
        return Outcome.WAIT, f"round {collection.number}: waiting for a quorum ({counts})"
    if not missing:
        return Outcome.CLOSE, f"round {collection.number}: closed ({counts})"
    if now >= collection.opened_at_s + wait_s:  # the very sum that a service sleeps until
        return Outcome.CLOSE, f"round {collection.number}: closed without {missing} ({counts})"
    return Outcome.WAIT, f"round {collection.number}: waiting for {missing} ({counts})"
