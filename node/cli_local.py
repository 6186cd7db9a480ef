"""The commands of `zo-node` beside training: doctor, predict, rotate-key."""

import json as json_format
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from node import embedded
from node.cli_app import (
    AdapterOption,
    DeviceOption,
    DtypeOption,
    LabelOption,
    MixOption,
    ModelOption,
    OwnDtypeOption,
    OwnQuantizeOption,
    QuantizeOption,
    SkipOption,
    TaskOption,
    TemplateOption,
    ThreadsOption,
    app,
    epilog,
    err,
    failures_explained,
    out,
)
from node.credentials import rotate
from node.device import AUTO
from node.doctor import Finding, examine
from node.quantization import Form, agreed
from node.service import NodeError
from node.state import StateDirectory, default_state
from node.tasks import adapters_in, asked, check_mix
from transport.exits import Exit
from transport.ticket import parse_ticket
from zo import kernels
from zo.manifest import Probing

_STYLE_BY_STATE = {"ok": "green", "warn": "yellow", "fail": "red"}


@app.command(
    name="rotate-key",
    short_help="Give this node a new key.",
    epilog=epilog("zo-node rotate-key 'zo://192.0.2.7:7411/…#…'"),
)
def rotate_key(
    ticket: Annotated[
        str, typer.Argument(metavar="TICKET", help="With which the node joined.", show_default=False)
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="With which it joined.")] = "node",
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where its key is.", show_default="~/.local/state/zo-node/…"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Seconds to wait for the coordinator.")
    ] = 30.0,
) -> None:
    """Give this node a new key, while it is not running. Number and history stay; the old key is worth nothing then."""
    with failures_explained():
        parsed = parse_ticket(ticket)
        directory = StateDirectory((state or default_state(parsed.run_id, name[:64])).expanduser())
        if not directory.has_keys():
            raise NodeError(Exit.INPUT, f"{directory.path} holds no key; join first, or name it with --state")
        with directory.lock():
            failure = rotate(directory, parsed, timeout, lambda _: None)
            if failure is not None:
                raise NodeError(failure.code, failure.reason)
            out.print(f"new key {directory.keys().public.hex()}", highlight=False, soft_wrap=True)


@app.command(
    short_help="Check this machine and the way there.",
    epilog=epilog("zo-node doctor 'zo://192.0.2.7:7411/…#…'"),
)
def doctor(
    ticket: Annotated[
        str | None,
        typer.Argument(metavar="TICKET", help="The run's ticket.", show_default="this machine alone"),
    ] = None,
    model: ModelOption = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of this node, as in join.")] = "node",
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where it keeps its state.", show_default="~/.local/state/zo-node/…"
        ),
    ] = None,
    quantize: QuantizeOption = None,
    skip_quantize: SkipOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = AUTO,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences in a batch.")] = 8,
    sequence_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens in a sequence.")] = 128,
    directions: Annotated[int, typer.Option(metavar="N", min=1, help="Directions in a round.")] = 1,
    threads: ThreadsOption = None,
    connect_timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Seconds to try to reach the coordinator.")
    ] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)] = False,
) -> None:
    """Check whether this machine can take part: network, key, disk, memory, base, kernels, time of a round.

    Joins nothing and changes nothing. If this node has joined the run before, base and settings are the run's. Exit
    code 12 if a check fails.
    """
    with failures_explained():
        parsed = parse_ticket(ticket) if ticket else None
        run_id = parsed.run_id if parsed else bytes(16)
        directory = StateDirectory((state or default_state(run_id, name[:64])).expanduser())
        manifest = directory.manifest()  # None if it has not joined yet
        if manifest:
            form, probing = agreed(manifest.base, quantize, skip_quantize, dtype, device), manifest.probe
        else:
            form = Form(quantize or "none", tuple(skip_quantize or ()), dtype or "float32", device)
            probing = Probing(
                epsilon=0.01, directions=directions, batch_size=batch_size, sequence_length=sequence_length
            )
        if not kernels.is_compiled():
            err.print("compiling the kernels, once for this machine …", style="dim")
            kernels.compile_kernels()
        with err.status("examining"):
            findings = list(
                examine(
                    ticket=parsed,
                    state=directory.path,
                    manifest=manifest,
                    model=model or str(embedded.path()),
                    form=form,
                    probing=probing,
                    threads=threads or len(os.sched_getaffinity(0)),
                    timeout_s=connect_timeout,
                )
            )
        if json:
            print(json_format.dumps([asdict(finding) for finding in findings]))
        else:
            out.print(_table(findings))
        if any(finding.state == "fail" for finding in findings):
            raise typer.Exit(Exit.MISMATCH)


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        said = Text(finding.found)
        if finding.cure:
            said.append(f"\n→ {finding.cure}", style="bold")
        table.add_row(Text(finding.state, style=_STYLE_BY_STATE[finding.state]), finding.check, said)
    return table


@app.command(
    short_help="Complete or classify a text.",
    epilog=epilog("zo-node predict 'Return the' --adapter my-adapter"),
)
def predict(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to go on from, or to classify.", show_default=False)
    ],
    model: ModelOption = None,
    adapter: AdapterOption = None,
    mix: MixOption = None,
    task: TaskOption = None,
    label: LabelOption = None,
    template: TemplateOption = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens to add.")] = 64,
    quantize: OwnQuantizeOption = "none",
    skip_quantize: SkipOption = None,
    dtype: OwnDtypeOption = "float32",
    device: DeviceOption = AUTO,
    threads: ThreadsOption = None,
) -> None:
    """Print what the model says after a prompt, the likeliest token each time; or the likeliest label.

    If the tokenizer has a chat template, the prompt is a user's turn. The probability of a label goes to stderr.
    Several adapters predict together: by the mean of their probabilities, or by vote, where of equal votes that of the
    earlier adapter counts.
    """
    with failures_explained():
        path = model or str(embedded.path())
        adapters = adapters_in(adapter or [])
        check_mix(mix, adapters)
        wanted, length = asked(path, adapters, task, label, template, None)
        from node.generation import classify, complete
        from node.language import open_model

        base, asked_model = open_model(
            path,
            adapters,
            wanted,
            mix=mix or "mean",
            threads=threads or len(os.sched_getaffinity(0)),
            form=Form(quantize, tuple(skip_quantize or ()), dtype, device),
        )
        if wanted.labels:
            chosen, probability = classify(base, asked_model, wanted, length, prompt)
            err.print(f"probability {probability:.3f}", style="dim", highlight=False)
        else:
            chosen = complete(base, asked_model, prompt, max_tokens)
        out.print(chosen, markup=False, highlight=False, soft_wrap=True)
