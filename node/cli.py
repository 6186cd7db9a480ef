"""`zo-node`: the only place of the node that speaks to a person, prints and exits."""

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from node import embedded
from node.base import BaseError, check_unchanged, load_base, read_digest, read_tokenizer_digest, resolve
from node.cli_app import (
    AdapterOption,
    ColumnOption,
    DeviceOption,
    DpClipOption,
    DpDeltaOption,
    DpEpsilonOption,
    DpNoiseOption,
    DtypeOption,
    EstimatorOption,
    LabelOption,
    MaxNewTokensOption,
    MixOption,
    ModelOption,
    ObjectiveOption,
    OwnDtypeOption,
    OwnQuantizeOption,
    QuantizeOption,
    ScoreOption,
    SkipOption,
    StartOption,
    TaskOption,
    TemplateOption,
    ThreadsOption,
    app,
    columns_by_field,
    demanded,
    epilog,
    err,
    fail,
    failures_explained,
    out,
)
from node.device import AUTO
from node.display import summary, view_line
from node.doctor import memory
from node.memory import EVALUATING, memory_explained
from node.privacy import Budget
from node.quantization import Form, agreed
from node.records import DataError
from node.scores import load_score
from node.service import NodeError, NodeService, View
from node.start import check_start, start_of
from node.state import StateDirectory, StateError, default_state, held_agents, load_result
from node.tasks import adapters_in, asked, check_mix, judged_by, keep_manifest
from node.wire import shown
from transport import hub
from transport.exits import Exit
from transport.sessions import assigned
from transport.ticket import parse_ticket
from zo import kernels
from zo.directions import run_key
from zo.initial import initial_weights
from zo.manifest import MAX_AGENTS, Manifest
from zo.poolfile import PoolFile, PoolFileError, decode_pool_file
from zo.replica import Replica

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
            if before is not None and before.run_id == parsed.run_id:
                check_unchanged(path, base_digest, tokenizer_digest, before)
            is_known = before is not None and before.run_id == parsed.run_id
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
                    _warn(f"{fits.found}; {fits.cure}")
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
                    warn=_warn,
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
                    _warn(rehearsal.warning)
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


@app.command(
    short_help="Write the weights as a PEFT adapter.",
    epilog=epilog("zo-node export my-run -o my-adapter --model ./my-model"),
)
def export(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Directory to write the adapter to.", show_default=False
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="A node's state directory or a coordinator's run directory.",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Instead of RUN: the pool file of a run, made by `zo-coordinator export --pool`.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    adapter: StartOption = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Write the whole model, the adapter merged into it.", show_default=False
        ),
    ] = False,
    agent: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Of this agent.", show_default="all that are there, each in a folder"
        ),
    ] = None,
) -> None:
    """Write the newest weights as a plain PEFT adapter, for PeftModel.from_pretrained, or as a whole model.

    Of a run with several agents each becomes an adapter in a folder of its own, agent-0 and so on, unless one is named.
    """
    with failures_explained():
        if (source is None) == (pool is None):
            raise NodeError(Exit.INPUT, "name a run's directory, or a pool file with --from FILE")
        replicas: list[Replica] = []
        if source is not None:
            manifest, replicas = _results(source, agent)
        else:
            manifest = (kept := _pool_file(pool)).manifest
        several = manifest.agents.count > 1 and pool is None
        if merge and several and agent is None:
            raise NodeError(
                Exit.INPUT, "--merge makes one model of one agent: name it with --agent, as in --agent 0"
            )
        path = model or str(embedded.path())
        _check_base(path, manifest, model)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DataError(f"{output} exists already; choose another directory")
        from node.language import adapt

        check_start(manifest, adapter)
        base = load_base(path, threads=1, labels=manifest.task.head_labels)
        first = start_of(manifest, adapter, base)
        trained = adapt(base, manifest, first)
        if source is None:
            values = None if first is None else first.values
            weights = initial_weights(
                trained.layout, run_key(manifest.run_id), manifest.adapter.train, values
            )
            replicas = [_rebuilt(kept, Replica(manifest, weights, agent=kept.agent))]
        try:
            for replica in replicas:
                folder = output / f"agent-{replica.agent}" if several and agent is None else output
                if merge:
                    trained.export_merged(folder, replica.weights, base.tokenizer)
                else:
                    trained.export(folder, replica.weights, path)
                keep_manifest(folder, manifest)
        except OSError as error:
            raise StateError(f"cannot write {output}: {error}") from error
        for replica in replicas:
            whose = f"agent {replica.agent}, " if several else ""
            out.print(f"{whose}round {replica.round}, digest {replica.digest().hex()}", highlight=False)
        kind = "CausalLM" if manifest.task.head_labels is None else "SequenceClassification"
        how = f"AutoModelFor{kind}.from_pretrained(" if merge else "PeftModel.from_pretrained(base, "
        out.print(f"wrote {output}: {how}{str(folder)!r})", highlight=False, soft_wrap=True)


@app.command(
    short_help="Measure a loss.",
    epilog=epilog("zo-node evaluate --data held-out.txt --adapter adapter"),
)
def evaluate(
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE", help="Data to measure on, as in join; may be repeated.", show_default=False
        ),
    ],
    model: ModelOption = None,
    adapter: AdapterOption = None,
    mix: MixOption = None,
    task: TaskOption = None,
    label: LabelOption = None,
    template: TemplateOption = None,
    column: ColumnOption = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Tokens in a row.",
            show_default="as the adapter's run; else at most 128",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Rows in one forward pass.")] = 8,
    objective: ObjectiveOption = None,
    score: ScoreOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    quantize: OwnQuantizeOption = "none",
    skip_quantize: SkipOption = None,
    dtype: OwnDtypeOption = "float32",
    device: DeviceOption = AUTO,
    threads: ThreadsOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)] = False,
) -> None:
    """Measure the loss of the base, with or without an adapter, as plain transformers and PEFT compute it.

    Where there are labels, the accuracy too: the share of the rows whose label the model thinks the likeliest. And the
    score, where the adapter's run had another objective than cross-entropy, or one is named here. Several adapters
    predict together; their vote has an accuracy, but no loss.
    """
    with failures_explained():
        path = model or str(embedded.path())
        adapters = adapters_in(adapter or [])
        check_mix(mix, adapters)
        wanted, length = asked(path, adapters, task, label, template, sequence_length)
        wanted = judged_by(wanted, objective, score, max_new_tokens)
        own = load_score(score) if score else None
        if mix == "vote" and not wanted.labels:
            raise DataError("a vote has no loss, and there are no labels to count: use --mix mean")
        from node.language import open_model, read_data
        from node.losses import measure
        from node.objectives import objective as objective_of

        base, measured = open_model(
            path,
            adapters,
            wanted,
            mix=mix or "mean",
            threads=threads or len(os.sched_getaffinity(0)),
            form=Form(quantize, tuple(skip_quantize or ()), dtype, device),
        )
        rows = read_data(data, base, wanted, length, columns_by_field(column))
        err.print(f"data: {rows}", style="dim", highlight=False, soft_wrap=True)
        scored = None
        columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            shown = bar.add_task("", total=rows.num_windows)

            def progress(done: int, _: int) -> None:
                bar.update(shown, completed=done)

            with memory_explained("to evaluate", EVALUATING):
                found = measure(measured, rows, batch_size=batch_size, progress=progress)
                if wanted.objective != "cross-entropy" and found.accuracy is None:
                    wanted_loss = objective_of(wanted, base, rows, own, _warn)
                    loss = measure(
                        measured, rows, batch_size=batch_size, objective=wanted_loss, progress=progress
                    ).loss
                    scored = 1 - loss
        if json:
            figures: dict[str, Any] = {} if mix == "vote" else {"loss": found.loss}
            figures |= {"windows": rows.num_windows}
            figures |= {"tokens": rows.num_scored} if found.accuracy is None else {"accuracy": found.accuracy}
            figures |= {} if scored is None else {"objective": wanted.objective, "score": scored}
            print(json_format.dumps(figures))
        elif mix == "vote":
            share = 100 * (found.accuracy or 0.0)
            out.print(f"accuracy {share:.1f} % over {rows.num_windows} rows", highlight=False, soft_wrap=True)
        else:
            of_what = {"text": "token over {} windows", "completion": "completion's token over {} rows"}
            what = of_what.get(wanted.kind, "label over {} rows").format(rows.num_windows)
            accuracy = "" if found.accuracy is None else f", accuracy {100 * found.accuracy:.1f} %"
            score_shown = "" if scored is None else f", {wanted.score or wanted.objective} {scored:.4f}"
            out.print(
                f"loss {found.loss:.4f} nats per {what}{accuracy}{score_shown}",
                highlight=False,
                soft_wrap=True,
            )


@app.command(short_help="A whole run on this machine.", epilog=epilog("zo-node demo --output demo-out"))
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Directory for everything it makes.")
    ] = Path("demo-out"),
    rounds: Annotated[int, typer.Option(metavar="N", min=12, help="Rounds to train.")] = 160,
    directions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Directions a node measures in a round.")
    ] = 2,
) -> None:
    """Fine-tune the embedded model with four processes on this machine; one is killed, another joins late.

    A coordinator and the nodes talk over real, encrypted connections on 127.0.0.1. Ends with exit code 1 if the
    held-out loss did not fall or any two digests differ.
    """
    from node.demo import DemoError, run_demo

    with failures_explained():
        try:
            passed = run_demo(output, rounds=rounds, directions=directions, console=out)
        except DemoError as error:
            fail(error, Exit.MISMATCH)
        if not passed:
            raise typer.Exit(1)


def _results(source: Path, agent: int | None) -> tuple[Manifest, list[Replica]]:
    """The manifest, and the weights of the agent that is named, or of all that are there."""
    try:
        found = [load_result(source, each) for each in (held_agents(source) if agent is None else [agent])]
        if not found:
            found = [load_result(source)]  # which says what is missing
    except StateError as error:
        raise NodeError(Exit.INPUT, str(error)) from error
    return found[0][0], [replica for _, replica in found]


def _pool_file(path: Path | None) -> PoolFile:
    """What a pool file holds."""
    assert path is not None
    try:
        return decode_pool_file(path.read_bytes())
    except OSError as error:
        raise NodeError(Exit.INPUT, f"cannot read {path}: {error.strerror}") from error
    except PoolFileError as error:
        raise NodeError(Exit.INPUT, f"{path}: {error}") from error


def _rebuilt(kept: PoolFile, start: Replica) -> Replica:
    """The weights of a pool file."""
    try:
        return kept.rebuilt(start)
    except PoolFileError as error:
        raise NodeError(Exit.DAMAGED, str(error)) from error


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
        _warn(
            "this node has been in the run before without --dp-epsilon: what it reported then is not in the budget"
        )


def _check_file(file: Path) -> None:
    """Say at once what is wrong with a file, before anything is loaded; `node.data` reads it later."""
    if not file.exists():
        raise DataError(f"{file}: no such file")
    if file.is_file() and file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")


def _check_base(path: str, manifest: Manifest, model: str | None) -> None:
    digest = read_digest(path)
    if digest != manifest.base.digest:
        spelled = hub.spelled(manifest.base.name, manifest.base.revision)
        cure = "" if model else ". Name the run's base with --model"
        raise BaseError(
            f"the base {path} has digest {digest}, the run's base {spelled!r} has {manifest.base.digest}{cure}"
        )


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


def _warn(what: str) -> None:
    err.print(f"warning: {what}", style="yellow", markup=False, highlight=False, soft_wrap=True)


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


# After the commands above, so that `--help` lists these below them.
from node import cli_calibrate, cli_local  # noqa: E402, F401


def main() -> None:
    """The entry point of `zo-node`."""
    app()


if __name__ == "__main__":
    main()
