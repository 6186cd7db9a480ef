"""What the modules of `zo-coordinator` share: the application, its two consoles, and errors told as one line."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from coordinator.audit import AuditError
from coordinator.calibration import CalibrationError
from coordinator.config import ConfigError
from coordinator.history import HistoryError
from coordinator.invitations import InvitationError
from coordinator.keyring import KeyringError
from coordinator.ledger import LedgerError, StorageError
from coordinator.rundir import BusyError, RunDirectoryError
from coordinator.simulation import SimulationError
from transport.adapter_files import AdapterFilesError
from transport.base_files import BaseFilesError
from transport.exits import HELP, Exit
from transport.keys import KeyFileError
from transport.sockets import SocketError
from zo.manifest import Manifest, ManifestError
from zo.snapshot import SnapshotError
from zo.weights import WeightsOverflow

app = typer.Typer(
    name="zo-coordinator",
    help="Order the bytes of a swarm into a ledger: one model, fine-tuned together, one byte per projected gradient.",
    epilog=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text keeps its lines whole in a narrow terminal
    pretty_exceptions_enable=False,
)
# Paths, names and manifests come from outside: nothing in them is markup of ours.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.", show_default=False)]
AgentOption = Annotated[
    int | None,
    typer.Option("--agent", metavar="N", min=0, help="Of this agent.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)]

_EXIT_BY_ERROR: dict[type[Exception], Exit] = {
    RunDirectoryError: Exit.INPUT,
    ManifestError: Exit.INPUT,
    HistoryError: Exit.INPUT,
    ConfigError: Exit.INPUT,
    BaseFilesError: Exit.BASE,
    AdapterFilesError: Exit.BASE,
    KeyFileError: Exit.INPUT,
    BusyError: Exit.BUSY,
    LedgerError: Exit.DAMAGED,
    KeyringError: Exit.DAMAGED,
    InvitationError: Exit.INPUT,
    SnapshotError: Exit.DAMAGED,
    AuditError: Exit.DAMAGED,
    StorageError: Exit.STORAGE,
    WeightsOverflow: Exit.OVERFLOW,
    SimulationError: Exit.MISMATCH,
}


def one_agent(manifest: Manifest, agent: int | None) -> int:
    """The agent that is meant where only one can be.

    Raises:
        HistoryError: the run has several and none was named, or it has no such agent.
    """
    last = manifest.agents.count - 1
    if agent is None and last:
        raise HistoryError(
            f"the run has the agents 0 to {last}, each with rounds of its own: name one with --agent"
        )
    return agents_meant(manifest, agent)[0]


def agents_meant(manifest: Manifest, agent: int | None) -> list[int]:
    """The agents that are meant where it can be all of them: the one that was named, or every one.

    Raises:
        HistoryError: the run has no such agent.
    """
    last = manifest.agents.count - 1
    if agent is not None and agent > last:
        has = f"has the agents 0 to {last}" if last else "has one agent, 0"
        raise HistoryError(f"the run {has}, got --agent {agent}")
    return list(range(last + 1)) if agent is None else [agent]


def epilog(example: str) -> str:
    """What follows a command's help; the line after \\b is left as it is, to be copied whole."""
    return f"\b\nExample:\n  {example}\n\n{HELP}"


@contextlib.contextmanager
def failures_explained() -> Iterator[None]:
    """Turn the errors we know into one line and their exit code; anything else is a bug and shows its trace."""
    try:
        yield
    except CalibrationError as error:
        _fail(error, error.code)
    except SocketError as error:
        is_in_use = getattr(error.__cause__, "errno", None) == errno.EADDRINUSE
        _fail(error, Exit.BUSY if is_in_use else Exit.INPUT)
    except tuple(_EXIT_BY_ERROR) as error:
        _fail(error, next(code for kind, code in _EXIT_BY_ERROR.items() if isinstance(error, kind)))


def _fail(error: Exception, code: Exit) -> None:
    err.print(f"zo-coordinator: error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code) from None
