"""What the modules of `zo-node` share: the application, its two consoles, options, and errors told as one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from node.base import BaseError
from node.device import DeviceError
from node.estimators import EstimatorError, Wanted
from node.memory import OutOfMemoryError
from node.privacy import Budget
from node.quantization import QuantizationError
from node.records import EXAMPLES, DataError
from node.scores import ScoreError
from node.service import NodeError
from node.state import StateBusyError, StateError
from node.tasks import Mix
from transport.exits import HELP, Exit
from transport.keys import KeyFileError
from transport.sockets import SocketError
from transport.ticket import TicketError
from zo.manifest import Objective, TaskKind
from zo.quantization import Dtype, Kind

app = typer.Typer(
    name="zo-node",
    help="Take part in fine-tuning one language model together; only bytes of projected gradients leave this machine.",
    epilog=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text keeps its lines whole in a narrow terminal
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

_EXIT_BY_ERROR: dict[type[Exception], Exit] = {
    TicketError: Exit.INPUT,
    DataError: Exit.INPUT,
    KeyFileError: Exit.INPUT,
    QuantizationError: Exit.INPUT,
    ScoreError: Exit.INPUT,
    EstimatorError: Exit.INPUT,
    DeviceError: Exit.INPUT,
    BaseError: Exit.BASE,
    OutOfMemoryError: Exit.MEMORY,
    StateError: Exit.STORAGE,
    StateBusyError: Exit.BUSY,
    SocketError: Exit.UNREACHABLE,
}

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Base model: a directory, or NAME or NAME@REVISION on the Hugging Face hub.",
        show_default="the small one of this program",
    ),
]
QuantizeOption = Annotated[
    Kind | None,
    typer.Option(
        metavar="none|int8|nf4|fp4",
        help="Hold the base's linear layers like this.",
        show_default="as the run says",
    ),
]
OwnQuantizeOption = Annotated[
    Kind,
    typer.Option("--quantize", metavar="none|int8|nf4|fp4", help="Hold the base's linear layers like this."),
]
"""Where no run has a say."""
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        metavar="|".join(get_args(Dtype)),
        help="Compute the base in this; what is trained stays float32.",
        show_default="as the run says",
    ),
]
OwnDtypeOption = Annotated[
    Dtype,
    typer.Option("--dtype", metavar="|".join(get_args(Dtype)), help="Compute the base in this."),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", metavar="cpu|cuda|cuda:N|auto", help="Where to compute; auto: on a GPU if there is one."
    ),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Linear module to leave unquantised; may be repeated.", show_default=False
    ),
]
AdapterOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="A PEFT adapter, or an export of several agents; may be repeated.",
        show_default="the base alone",
    ),
]
MixOption = Annotated[
    Mix | None,
    typer.Option(
        "--mix",
        metavar="mean|vote",
        help="Of several adapters: the mean of their probabilities, or a vote of what each holds the likeliest.",
        show_default="mean",
    ),
]
TaskOption = Annotated[
    TaskKind | None,
    typer.Option(
        "--task",
        metavar="|".join(get_args(TaskKind)),
        help="What the data is, and what of it is predicted.",
        show_default="as the adapter's run; else text",
    ),
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="LABEL[=WORD]",
        help="A label of the data, in the order of the model's, and for a verbalizer its word; may be repeated.",
        show_default="as the adapter's run",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        help="What a verbalizer's word follows, with {text} for the row's text.",
        show_default="as the adapter's run",
    ),
]
StartOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="The PEFT adapter that the run starts from, if it does.",
        show_default=False,
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="FIELD=NAME",
        help="What a field of the data (text, label, prompt, completion) is called in the files, or the number of its "
        "column in a .tsv file without a line of names; may be repeated.",
        show_default="its own name",
    ),
]
ObjectiveOption = Annotated[
    Objective | None,
    typer.Option(
        "--objective",
        metavar="NAME",
        help=f"Score the model by this, too: {', '.join(get_args(Objective)[1:])}.",
        show_default="as the adapter's run",
    ),
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        min=1,
        help="Most tokens that the model says after a prompt, where that is judged.",
        show_default="as the adapter's run; else 32",
    ),
]
ScoreOption = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="MODULE:FUNCTION",
        help="Your own (prompts, completions) -> scores, where the run's objective is a callable.",
        show_default=False,
    ),
]
EstimatorOption = Annotated[
    Wanted | None,
    typer.Option(
        "--estimator",
        metavar="HOW",
        help="How to measure slopes: two-sided or one-sided, from losses; spsa, whichever of these the run says; "
        "forward, exactly, by forward mode; backward, exactly, by backpropagation, which takes its memory; moves: not "
        "slopes, but where own training leads, if the run allows it; auto: what is best here, as measured.",
        show_default="as the run says",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Threads to compute with.", show_default="all cores"),
]
DpEpsilonOption = Annotated[
    float | None,
    typer.Option(
        "--dp-epsilon",
        metavar="E",
        help="Be differentially private, and leave once this much is spent; needs the extra [privacy].",
        show_default="not private",
    ),
]
DpDeltaOption = Annotated[
    float | None,
    typer.Option("--dp-delta", metavar="D", help="Delta at which epsilon is stated.", show_default="1e-5"),
]
DpClipOption = Annotated[
    float | None,
    typer.Option(
        "--dp-clip",
        metavar="C",
        help="Most that one row may say: of its loss, how much it differs between two views.",
        show_default=False,
    ),
]
DpNoiseOption = Annotated[
    float | None,
    typer.Option(
        "--dp-noise",
        metavar="S",
        help="Noise in units of --dp-clip.",
        show_default="so that the budget lasts for the whole run",
    ),
]


def columns_by_field(given: list[str] | None) -> dict[str, str]:
    """What `--column` says.

    Raises:
        DataError: not FIELD=NAME, or a field that no task has.
    """
    columns = {}
    for each in given or ():
        field, _, name = each.partition("=")
        if field not in EXAMPLES or not name:
            raise DataError(
                f"--column {each}: expected FIELD=NAME with one of {', '.join(EXAMPLES)} as FIELD"
            )
        columns[field] = name
    return columns


def demanded(
    epsilon: float | None, delta: float | None, clip: float | None, noise: float | None
) -> Budget | None:
    """What `--dp-epsilon` and its companions say; None if nothing.

    Raises:
        DataError: they do not go together, or cannot be.
    """
    if epsilon is None:
        if delta is not None or clip is not None or noise is not None:
            raise DataError("--dp-delta, --dp-clip and --dp-noise need --dp-epsilon, the budget")
        return None
    if clip is None:
        raise DataError(
            "--dp-epsilon needs --dp-clip, most that one row may say: try the differences of losses that "
            "`zo-node calibrate` shows on public data"
        )
    return Budget(epsilon=epsilon, delta=1e-5 if delta is None else delta, clip=clip, noise=noise)


def epilog(example: str) -> str:
    """What follows a command's help; the lines after \\b are left as they are, to be copied whole."""
    return f"\b\nExample:\n  {example}\n\n{HELP}"


@contextlib.contextmanager
def failures_explained() -> Iterator[None]:
    """Turn the errors we know into one line and their exit code; anything else is a bug and shows its trace."""
    try:
        yield
    except NodeError as error:
        fail(error, error.code)
    except tuple(_EXIT_BY_ERROR) as error:
        fail(error, next(code for kind, code in _EXIT_BY_ERROR.items() if isinstance(error, kind)))


def fail(error: Exception, code: Exit) -> None:
    """Say what went wrong in one line, and leave with its exit code."""
    err.print(f"zo-node: error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code) from None


def warn(what: str) -> None:
    """Say what may not be as the person at the node expects, and go on."""
    err.print(f"warning: {what}", style="yellow", markup=False, highlight=False, soft_wrap=True)
