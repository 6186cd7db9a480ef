"""Exit codes of both commands: one per kind of failure, so that a supervisor can tell what to do."""

from enum import IntEnum


class Exit(IntEnum):
    """Why a command ended. 1 is left to Python (a bug), 2 to the command line's own usage errors."""

    OK = 0
    INPUT = 3
    """A value, ticket, data file, manifest or directory is wrong; change it."""
    BUSY = 4
    """The port or the directory is in use by another process."""
    BASE = 5
    """The base model is missing, broken, or not the run's."""
    DAMAGED = 6
    """A ledger, snapshot or state file is damaged or belongs to another run or version."""
    STORAGE = 7
    """The disk is full or cannot be written; nothing that was acknowledged is lost."""
    OVERFLOW = 8
    """A weight would leave its range; the run was stopped before it did."""
    UNREACHABLE = 9
    """Nobody answers at the ticket's address."""
    WRONG_KEY = 10
    """Somebody answers, but is not the coordinator of this ticket."""
    REFUSED = 11
    """The coordinator does not admit this node; its reason is shown."""
    MISMATCH = 12
    """A check that was asked for failed: digests differ, or a loss did not fall."""
    MEMORY = 13
    """Memory does not suffice; what to lower is shown."""
    FORGED = 14
    """A history that the run's coordinator has not signed, or has signed otherwise: a forgery, or a fork."""
    BUDGET = 15
    """The node's privacy budget is spent; it left in good order and says no more of its data."""


HELP = "Exit codes: " + "; ".join(
    f"{code.value} {text}"
    for code, text in {
        Exit.OK: "done",
        Exit.INPUT: "bad input",
        Exit.BUSY: "port or directory in use",
        Exit.BASE: "base missing or another",
        Exit.DAMAGED: "damaged or foreign files",
        Exit.STORAGE: "disk full or not writable",
        Exit.OVERFLOW: "weights out of range",
        Exit.UNREACHABLE: "coordinator unreachable",
        Exit.WRONG_KEY: "wrong coordinator key",
        Exit.REFUSED: "refused by the coordinator",
        Exit.MISMATCH: "a check failed",
        Exit.MEMORY: "not enough memory",
        Exit.FORGED: "history forged or forked",
        Exit.BUDGET: "privacy budget spent",
    }.items()
)
