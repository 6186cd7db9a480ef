"""`zo-node`: the only place of the node that speaks to a person, prints and exits."""

import json as json_format
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError

from node import cli_join, embedded  # noqa: F401  # join first, so that `--help` begins with it
from node.base import check_base, load_base
from node.cli_app import (
    AdapterOption,
    ColumnOption,
    DeviceOption,
    LabelOption,
    MaxNewTokensOption,
    MixOption,
    ModelOption,
    ObjectiveOption,
    OwnDtypeOption,
    OwnQuantizeOption,
    ScoreOption,
    SkipOption,
    StartOption,
    TaskOption,
    TemplateOption,
    ThreadsOption,
    app,
    columns_by_field,
    epilog,
    err,
    fail,
    failures_explained,
    out,
    warn,
)
from node.device import AUTO
from node.memory import EVALUATING, memory_explained
from node.quantization import Form
from node.records import DataError
from node.scores import load_score
from node.service import NodeError
from node.start import check_start, start_of
from node.state import DamagedStateError, StateError, held_agents, load_result
from node.tasks import adapters_in, asked, check_mix, judged_by, keep_manifest
from transport.exits import Exit
from zo.directions import run_key
from zo.initial import initial_weights
from zo.manifest import Manifest
from zo.poolfile import PoolFile, PoolFileError, decode_pool_file
from zo.replica import Replica

# torch, transformers and peft take seconds to import; the modules that need them are imported where they are used, so
# that a wrong ticket or an unreachable coordinator is said at once.


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
    """Write the newest saved weights as a plain PEFT adapter, for PeftModel.from_pretrained, or as a whole model.

    Of a coordinator's directory these are its newest snapshot's, which may be some rounds old while it serves:
    zo-coordinator export writes any round.

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
        check_base(path, manifest, model)
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
        except BaseException as error:
            shutil.rmtree(output, ignore_errors=True)  # it was not there before, or empty
            if isinstance(error, OSError | SafetensorError):
                raise StateError(f"cannot write {output}: {error}") from error
            raise
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
                    wanted_loss = objective_of(wanted, base, rows, own, warn)
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
        code = Exit.DAMAGED if isinstance(error, DamagedStateError) else Exit.INPUT
        raise NodeError(code, str(error)) from error
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


# After the commands above, so that `--help` lists these below them.
from node import cli_calibrate, cli_local  # noqa: E402, F401


def main() -> None:
    """The entry point of `zo-node`."""
    app()


if __name__ == "__main__":
    main()
