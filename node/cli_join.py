"""The command of `zo-node` that takes part in a run."""

import contextlib
import json as json_format
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live

from node import embedded
from node.base import check_unchanged, load_base, read_digest, read_tokenizer_digest, resolve
from node.cli_app import (
    ColumnOption,
    DeviceOption,
    DpClipOption,
    DpDeltaOption,
    DpEpsilonOption,
    DpNoiseOption,
    DtypeOption,
    EstimatorOption,
    ModelOption,
    QuantizeOption,
    ScoreOption,
    SkipOption,
    StartOption,
    ThreadsOption,
    app,
    columns_by_field,
    demanded,
    epilog,
    err,
    failures_explained,
    warn,
)
from node.device import AUTO
from node.display import summary, view_line
from node.doctor import memory
from node.privacy import Budget
from node.quantization import agreed
from node.records import DataError
from node.scores import load_score
from node.service import NodeError, NodeService, View
from node.start import check_start
from node.state import StateDirectory, StateError, default_state
from node.wire import shown
from transport.exits import Exit
from transport.sessions import assigned
from transport.ticket import parse_ticket
from zo import kernels
from zo.manifest import MAX_AGENTS, Manifest

# torch, transformers and peft take seconds to import; the modules that need them are imported where they are used, so
# that a wrong ticket or an unreachable coordinator is said at once.


@app.command(
    short_help="Join a run and train.",
    epilog=epilog("zo-node join 'zo://192.0.2.7:7411/…#…' --data notes.txt"),
)
def join(
    ticket: Annotated[
        str,
        typer.Argument(
            metavar="TICKET", help="The line that `zo-coordinator serve` printed.", show_default=False
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Private training data: .jsonl, .tsv or a saved dataset with the fields of the run's task (text; "
            "prompt and completion; text and label), or .txt; may be repeated.",
            show_default=False,
        ),
    ],
    column: ColumnOption = None,
    model: ModelOption = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Name of this node; the coordinator sees it.")
    ] = "node",
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to keep key and weights.", show_default="~/.local/state/zo-node/…"
        ),
    ] = None,
    adapter: StartOption = None,
    agents: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Agents to train, where the run has each node name its own.",
            show_default="all, where it does not",
        ),
    ] = None,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Held-out data to measure the loss on; may be repeated.",
            show_default=False,
        ),
    ] = None,
    eval_every: Annotated[
        int, typer.Option(metavar="N", min=1, help="Measure it every so many rounds.")
    ] = 50,
    start_over: Annotated[
        bool,
        typer.Option(
            "--start-over",
            help="Set the saved weights aside, and take the run's from the beginning; the key and number stay.",
            show_default=False,
        ),
    ] = False,
    score: ScoreOption = None,
    quantize: QuantizeOption = None,
    skip_quantize: SkipOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = AUTO,
    threads: ThreadsOption = None,
    estimator: EstimatorOption = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=64,
            help="Directions whose two views share a forward pass; 0: one view at a time, which takes least memory.",
            show_default="the fastest",
        ),
    ] = None,
    dp_epsilon: DpEpsilonOption = None,
    dp_delta: DpDeltaOption = None,
    dp_clip: DpClipOption = None,
    dp_noise: DpNoiseOption = None,
    connect_timeout: Annotated[
        float,
        typer.Option(metavar="S", min=0.1, help="Seconds to try to reach the coordinator at first."),
    ] = 30.0,
    show_wire: Annotated[
        bool,
        typer.Option(
            "--show-wire",
            help="Print every message that leaves, and its bytes, on standard output.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Join a run and train until it ends or Ctrl-C; joining again goes on where this node left.

    Nothing of the data leaves this machine but one byte per direction and, if the run's manifest says so, a mean loss.
    With --dp-epsilon these bytes are differentially private, no loss is sent, and the node leaves when its budget is
    spent.
    """
    with failures_explained():
        parsed = parse_ticket(ticket)
        budget = demanded(dp_epsilon, dp_delta, dp_clip, dp_noise)
        columns = columns_by_field(column)
        own_score = load_score(score) if score else None
        named = _agent_numbers(agents)
        for file in [*data, *(eval_data or [])]:
            _check_file(file.expanduser())
        name = name[:64]
        directory = StateDirectory((state or default_state(parsed.run_id, name)).expanduser())
        path = model or str(embedded.path())
        with directory.lock(), _log(directory.log_path) as log, _live_line(is_renewed=not show_wire) as show:
            base_digest, tokenizer_digest = read_digest(path), read_tokenizer_digest(path)
            before = directory.manifest()
            is_known = before is not None and before.run_id == parsed.run_id
            if before is not None and is_known:
                check_unchanged(path, base_digest, tokenizer_digest, before)
            elif before is not None and directory.saved_weights() and not start_over:
                raise NodeError(
                    Exit.DAMAGED,
                    f"{directory.path} is of another run, {before.run.name} ({before.run_id.hex()}), whose weights "
                    "would be lost; name another --state, or set them aside with --start-over",
                )
            _check_promise(directory, budget, is_known)
            _compile_kernels()
            if start_over and (aside := directory.set_aside()) is not None:
                err.print(
                    f"set the saved weights aside in {aside}, where `zo-node export` finds them",
                    highlight=False,
                    soft_wrap=True,
                )
            num_threads = threads or len(os.sched_getaffinity(0))

            def open_trainer(manifest: Manifest) -> Any:
                from node.language import LanguageTrainer, read_data

                check_start(manifest, adapter)
                form = agreed(manifest.base, quantize, skip_quantize, dtype, device)
                fits = memory(resolve(path), form)
                if fits.state == "fail":
                    warn(f"{fits.found}; {fits.cure}")
                base = load_base(
                    path, threads=num_threads, labels=manifest.task.head_labels, **form._asdict()
                )
                task, length = manifest.task, manifest.probe.sequence_length
                windows = read_data(data, base, task, length, columns)
                err.print(f"training data: {windows}", style="dim", highlight=False, soft_wrap=True)
                held_out = read_data(eval_data, base, task, length, columns) if eval_data else None
                guard = None
                if budget is not None:
                    from node.budget import Account, Guard, plan

                    num_agents = len(assigned(manifest, named))
                    wanted = plan(budget, manifest, windows.num_windows, num_agents, form.quantize)
                    guard = Guard(budget, wanted, Account(directory.privacy_path, 1 + manifest.run.pipeline))
                    err.print(str(guard), style="dim", highlight=False, soft_wrap=True)
                trainer = LanguageTrainer(
                    manifest,
                    base,
                    windows,
                    held_out,
                    private_seed=directory.private_seed(),
                    threads=num_threads,
                    score=own_score,
                    warn=warn,
                    start=adapter,
                    mechanism=None if guard is None else guard.mechanism,
                )
                rehearsal = trainer.rehearse(at_once)
                log({"rehearsal": asdict(rehearsal)})
                err.print(f"probing: {rehearsal}", style="dim", highlight=False, soft_wrap=True)
                chosen = trainer.choose_estimator(estimator, rehearsal)
                log({"estimator": chosen})
                if estimator is not None:
                    err.print(f"estimator: {chosen}", style="dim", highlight=False, soft_wrap=True)
                if rehearsal.warning:
                    warn(rehearsal.warning)
                if guard is None:
                    return trainer
                from node.budget import PrivateTrainer, Spending

                def told(spending: Spending) -> None:
                    service.view.privacy = f"epsilon {spending.epsilon:.3g} of {guard.budget.epsilon:g}"
                    log(spending._asdict())

                return PrivateTrainer(trainer, guard, told)

            service = NodeService(
                parsed,
                directory,
                base_digest,
                tokenizer_digest,
                open_trainer,
                name=name,
                connect_timeout_s=connect_timeout,
                evaluate_every=eval_every if eval_data else 0,
                agents=named,
                shares_loss=budget is None,
                show=show,
                log=log,
                on_sent=_print_sent if show_wire else lambda _: None,
            )
            try:
                reason = service.run()
            except NodeError as error:
                if error.code is Exit.BASE and model is None:
                    raise NodeError(error.code, f"{error}. Name the run's base with --model") from error
                raise
        err.print(reason, highlight=False, soft_wrap=True)
        err.print(summary(service.view), highlight=False)
        err.print(f"state in {directory.path}", style="dim", highlight=False, soft_wrap=True)


def _agent_numbers(text: str | None) -> list[int] | None:
    """The numbers in "1,3"; None for none."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) < MAX_AGENTS for part in parts):
        raise NodeError(
            Exit.INPUT,
            f"--agents takes numbers from 0 to {MAX_AGENTS - 1} with commas between, as 1,3; got {text!r}",
        )
    return [int(part) for part in parts]


def _check_promise(directory: StateDirectory, budget: Budget | None, is_known: bool) -> None:
    """Refuse to break what was promised of this data, and say what was never promised."""
    has_promised = directory.privacy_path.exists()
    if budget is None:
        if has_promised:
            raise DataError(
                f"what this node reported was differentially private, says {directory.privacy_path}: join with "
                "--dp-epsilon, or as another node with --name, which has a budget of its own"
            )
        return
    if find_spec("dp_accounting") is None:
        raise DataError("--dp-epsilon needs dp-accounting: pip install -c constraints.txt '.[privacy]'")
    if is_known and not has_promised:
        warn(
            "this node has been in the run before without --dp-epsilon: what it reported then is not in the budget"
        )


def _check_file(file: Path) -> None:
    """Say at once what is wrong with a file, before anything is loaded; `node.data` reads it later."""
    if not file.exists():
        raise DataError(f"{file}: no such file")
    if file.is_file() and file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")


def _compile_kernels() -> None:
    if not kernels.is_compiled():
        err.print("compiling the kernels, once for this machine …", style="dim")
        kernels.compile_kernels()


@contextlib.contextmanager
def _log(path: Path) -> Iterator[Callable[[dict[str, object]], None]]:
    """Appends one JSON object for each record."""

    def write(record: dict[str, object]) -> None:
        try:
            print(json_format.dumps({"at": round(time.time(), 3), **record}), file=file)
        except OSError as error:
            raise StateError(f"cannot write {path}: {error.strerror}") from error

    try:
        file = path.open("a", buffering=1)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield write
    finally:
        with contextlib.suppress(OSError):  # what could not be written has been said
            file.close()


def _print_sent(frame: bytes) -> None:
    print(shown(frame), flush=True)


@contextlib.contextmanager
def _live_line(is_renewed: bool) -> Iterator[Callable[[View], None]]:
    """A line that renews itself in a terminal, or one line every ten seconds where there is none or it is in use."""
    shown_at = -math.inf
    if err.is_terminal and is_renewed:
        with Live(console=err, auto_refresh=False) as live:

            def show(view: View) -> None:
                nonlocal shown_at
                if time.monotonic() - shown_at > 0.1:
                    shown_at = time.monotonic()
                    live.update(view_line(view), refresh=True)

            yield show
        return
    shown_at = time.monotonic()  # a log needs no "connecting …" of a join that is refused a moment later

    def show_rarely(view: View) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at > 10:
            shown_at = time.monotonic()
            err.print(view_line(view), highlight=False, soft_wrap=True)
            sys.stderr.flush()

    yield show_rarely
