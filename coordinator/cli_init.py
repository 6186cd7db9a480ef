"""The command of `zo-coordinator` that makes a run: what all nodes will share, from options and the base's files."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import msgspec
import typer

from coordinator.audit_rows import audit_rows
from coordinator.calibration import proposed_epsilon
from coordinator.cli_app import RunArgument, app, epilog, err, failures_explained, out
from coordinator.config import ServiceConfig, check_capacity
from coordinator.config import validate as validate_config
from coordinator.rundir import RunDirectory
from coordinator.trained import default_targets, head_of
from transport import base_files, hub
from transport.adapter_files import AdapterFilesError, Factors, read_start
from transport.adapter_files import digest as adapter_digest
from transport.messages import PROTOCOL_VERSION
from transport.seals import Signer
from zo.directions import run_key
from zo.initial import initial_weights
from zo.layout import lora_layout
from zo.manifest import (
    DEFAULT_POOL,
    DEFAULT_TEMPLATE,
    ESTIMATORS,
    GENERATED,
    Adapter,
    Agents,
    Audits,
    BaseModel,
    Coding,
    Combination,
    Decay,
    Directions,
    Estimator,
    Manifest,
    ManifestError,
    Moves,
    Objective,
    Parity,
    Policy,
    Probing,
    Run,
    Schedule,
    TaskKind,
    validate,
)
from zo.manifest import task as task_of
from zo.quantization import Dtype, Kind, check_shapes
from zo.replica import Replica
from zo.steps import step_bits, step_rule

_EPSILON = 0.01
# What docs/recipes.md found: for models of 0.3 to 1 million parameters; no other size has been tried.
_STEPS = {"B": 0.002, "AB": 0.001}
_ONE_SIDED_FROM = 4
"""Directions; with fewer, too much is lost to the mean of them that each is compared with."""
_RANK = 4
_GROUPS = 4
_TRIM = 25
_ALPHA = 8.0


@app.command(
    short_help="Make a run directory.",
    epilog=epilog("zo-coordinator init my-run --model ./my-model"),
)
def init(
    run: RunArgument,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Base model: a directory with config.json, *.safetensors and tokenizer, or NAME or NAME@REVISION on "
            "the Hugging Face hub.",
            show_default=False,
        ),
    ],
    quantize: Annotated[
        Kind, typer.Option(metavar="none|int8|nf4|fp4", help="How nodes hold the base's linear layers.")
    ] = "none",
    skip_quantize: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Linear module to leave unquantised; may be repeated.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            metavar="|".join(get_args(Dtype)), help="What nodes compute the base in; the adapter is float32."
        ),
    ] = "float32",
    any_quantization: Annotated[
        bool,
        typer.Option(
            "--any-quantization",
            help="A node may choose another quantisation or dtype.",
            show_default=False,
        ),
    ] = False,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds until the run is finished.")] = 300,
    directions: Annotated[
        int, typer.Option(metavar="N", help="Directions a node measures in a round, a code each.")
    ] = 4,
    code_bits: Annotated[
        int,
        typer.Option(
            metavar="8|4|1",
            help="Bits of a code: 8; 4, two in a byte; or 1, its sign alone, eight in a byte.",
        ),
    ] = 8,
    sides: Annotated[
        int | None,
        typer.Option(
            metavar="1|2",
            help="2: two losses for a direction, at +epsilon and -epsilon. 1: one, compared with the mean over all "
            "directions of the node.",
            show_default="1 from 4 directions on",
        ),
    ] = None,
    estimators: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="How nodes may measure slopes, each for itself: two-sided, one-sided, forward or backward.",
        ),
    ] = ",".join(ESTIMATORS),
    moves: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Let nodes that can train the base report moves instead of slopes: so many codes; 0: none may.",
        ),
    ] = 0,
    updates: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps of the optimizer that make a move.", show_default="10"),
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "sgd"] | None,
        typer.Option(metavar="adamw|sgd", help="What makes them.", show_default="adamw"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Its learning rate; it decays as the step does.", show_default="0.003"
        ),
    ] = None,
    local_steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Steps that a node takes on its own in a round, with its directions, before it reports: fewer rounds "
            "for as much work.",
        ),
    ] = 1,
    step: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How far a direction moves the weights; with --raw, the learning rate.",
            show_default="0.001; 0.002 if only B is trained",
        ),
    ] = None,
    policy: Annotated[
        Policy,
        typer.Option(
            metavar="|".join(get_args(Policy)),
            help="Nodes measure directions of their own, or such from a pool, or all the same, or the same within a "
            "group; codes for the same direction of a round are combined.",
        ),
    ] = "private",
    groups: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of the policy groups: how many.", show_default=str(_GROUPS)),
    ] = None,
    combine: Annotated[
        Combination,
        typer.Option(
            metavar="|".join(get_args(Combination)),
            help="How codes for the same direction become one; majority is of their signs.",
        ),
    ] = "mean",
    trim: Annotated[
        int | None,
        typer.Option(
            metavar="PERCENT",
            help="Of the trimmed mean: what it leaves out at either end.",
            show_default=str(_TRIM),
        ),
    ] = None,
    pool_size: Annotated[
        int, typer.Option(metavar="N", help="Of the policy pool: directions in it.")
    ] = DEFAULT_POOL,
    pool_draw: Annotated[
        Literal["uniform", "importance"],
        typer.Option(
            metavar="uniform|importance",
            help="Of the policy pool: draw all as often, or in proportion to the size of their codes.",
        ),
    ] = "uniform",
    full_votes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Directions of a round up to which each moves them by the whole step.",
            show_default="64 for each local step",
        ),
    ] = None,
    decay: Annotated[
        Decay,
        typer.Option(
            metavar="|".join(get_args(Decay)),
            help="How the step changes. linear: to 0 at the last round. cosine: likewise, longer near both ends. "
            "halving: by half every --half-life rounds, for a run whose end is not known. constant: for few rounds, or "
            "to go on from another run.",
        ),
    ] = "linear",
    half_life: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Rounds after which the step halves, with --decay halving.",
            show_default="a quarter of the rounds",
        ),
    ] = None,
    warm_up: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="First rounds, in which the step grows to its full size: if the loss jumps up at the start.",
        ),
    ] = 0,
    normalised: Annotated[
        bool,
        typer.Option(
            "--normalised/--raw",
            help="Divide the step by the size of the slopes, which suits any loss; or multiply it with the slopes as "
            "they are, as MeZO does: to repeat settings that were published.",
        ),
    ] = True,
    momentum: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="The weights go 2^-K of the way to where the steps lead, each round; 0: all of it. 3 is a momentum of "
            "0.875 whose steps add up to the same. Smooths noise at 4 bytes of memory a parameter, and delays. With "
            "many more parameters than directions it does little.",
        ),
    ] = 0,
    weight_decay: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="The weights go 2^-K of the way back to their start, each round; 0: they do not. For long runs on "
            "little data: 10 halves a distance in 710 rounds. Rules out rollback and retract, and costs 4 bytes of "
            "memory a parameter.",
        ),
    ] = 0,
    epsilon: Annotated[
        float | None,
        typer.Option(metavar="X", help="Length of the probe in each direction.", show_default=str(_EPSILON)),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Measure on such data, as nodes have it, which epsilon suits, and use that; needs the node's extras; "
            "may be repeated.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=NAME",
            help="What a field is called in the files of --calibrate, as for `zo-node join`; may be repeated.",
            show_default="its own name",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A PEFT LoRA adapter to start from: it brings rank, alpha and modules, and nodes must have it.",
            show_default="generated values",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="LoRA rank.", show_default=str(_RANK))] = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="X", help="LoRA alpha.", show_default=str(_ALPHA))
    ] = None,
    train: Annotated[
        Literal["B", "AB"],
        typer.Option(metavar="B|AB", help="B: freeze A, train B from zero. AB: train both."),
    ] = "AB",
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Linear module to adapt, or none to train the head alone; may be repeated.",
            show_default="all in the base's layers",
        ),
    ] = None,
    task: Annotated[
        TaskKind,
        typer.Option(
            metavar="|".join(get_args(TaskKind)),
            help="What the data is: plain text; rows of prompt and completion; rows of text and label, predicted "
            "as the next word, or by a head on the base.",
        ),
    ] = "text",
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL[=WORD]",
            help="A label of the data, and for a verbalizer its word; may be repeated, once for each.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What a verbalizer's word follows, with {text} for the row's text.",
            show_default=repr(DEFAULT_TEMPLATE)[1:-1],
        ),
    ] = None,
    agents: Annotated[
        int, typer.Option(metavar="N", help="Adapters to train side by side on the one base.")
    ] = 1,
    assignment: Annotated[
        Literal["all", "by-node"],
        typer.Option(
            metavar="all|by-node",
            help="Nodes train every agent, or those that each names with `join --agents`.",
        ),
    ] = "all",
    objective: Annotated[
        Objective,
        typer.Option(
            metavar="NAME",
            help="What the loss is: cross-entropy, or one less a score: accuracy, token-f1 or exact-match of what the "
            "model says after a prompt, or a callable that each node has.",
        ),
    ] = "cross-entropy",
    score: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="With a callable, its name for people; nodes name theirs when they join.",
            show_default=False,
        ),
    ] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Most tokens said after a prompt, where that is judged.", show_default="32"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sequences in a node's batch.")] = 8,
    sequence_length: Annotated[int, typer.Option(metavar="N", help="Tokens in a sequence.")] = 128,
    digest_every: Annotated[
        int, typer.Option(metavar="N", help="Nodes report a digest every so many rounds.")
    ] = 16,
    share_loss: Annotated[
        bool,
        typer.Option(
            "--share-loss/--no-share-loss",
            help="Whether nodes report their mean training loss with it.",
        ),
    ] = True,
    audit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Public rows, at most 64: a .jsonl like the nodes' data, or a .txt. At random rounds all nodes tell "
            "their losses on them; whose are far from the others' is found.",
            show_default=False,
        ),
    ] = None,
    staleness: Annotated[
        int, typer.Option(metavar="0|1", help="1: a report too late for its round counts in the next one.")
    ] = 0,
    pipeline: Annotated[
        bool,
        typer.Option(
            "--pipeline",
            help="Nodes measure the next round while the commit of this one is on its way: for links of long delay.",
            show_default=False,
        ),
    ] = False,
    quorum: Annotated[int, typer.Option(metavar="N", help="Least number of reports in a round.")] = 1,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; * for all.")
    ] = ServiceConfig().host,
    port: Annotated[
        int, typer.Option(metavar="PORT", help="TCP port to listen on; 0 for any.")
    ] = ServiceConfig().port,
    invite_only: Annotated[
        bool,
        typer.Option(
            "--invite-only",
            help="Let in only whom `invite` or `allow` names, not whoever has the ticket that serve prints.",
            show_default=False,
        ),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the run, for people.", show_default="the directory's"),
    ] = None,
) -> None:
    """Make a run directory: manifest, configuration, keys and an empty ledger.

    Reads the base's files without loading it. Nodes whose base differs from it are refused.
    """
    one_sided = "one-sided" in estimators.split(",")
    given = {"updates": updates, "optimizer": optimizer, "rate": rate}
    of_moves: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with failures_explained():
        if of_moves and not moves:
            raise ManifestError(
                f"--{next(iter(of_moves))} is for moves, and without --moves no node may report any"
            )
        if column and not calibrate:
            raise ManifestError("--column is for the files of --calibrate, and none are given")
        if max_new_tokens is not None and objective not in GENERATED:
            raise ManifestError(
                f"--max-new-tokens: with --objective {objective} nothing is said after a prompt"
            )
        directory = RunDirectory(run)
        signing_key = secrets.token_bytes(32)
        found = hub.find(model)
        tensors = base_files.tensor_shapes(found.folder)
        shapes = base_files.linear_shapes(tensors, base_files.configuration(found.folder))
        base = BaseModel(
            name=found.name,
            revision=found.revision,
            digest=base_files.digest(found.folder),
            tokenizer_digest=base_files.tokenizer_digest(found.folder),
            quantize=quantize,
            skip_quantize=tuple(skip_quantize or ()),
            dtype=dtype,
            any_quantization=any_quantization,
        )
        try:
            if step is None and not normalised:
                raise ManifestError(
                    "--raw needs --step: how large a learning rate is depends on the slopes of a model's loss"
                )
            trained = msgspec.structs.replace(
                task_of(task, label or (), template),
                objective=objective,
                score=score,
                **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
            )
            head = None
            if trained.head_labels is not None:
                head = head_of(base_files.configuration(found.folder), tensors, len(trained.head_labels))
            if adapter is None:
                start = None
                factors = Factors(
                    targets=() if target == ["none"] else tuple(target or default_targets(shapes)),
                    rank=_RANK if rank is None else rank,
                    alpha=_ALPHA if alpha is None else alpha,
                )
            elif (rank, alpha, target) != (None, None, None):
                raise ManifestError(
                    "--adapter brings rank, alpha and modules: leave out --rank, --alpha and --target"
                )
            else:
                start = read_start(adapter, shapes, head)
                factors = start.factors
            layout = lora_layout(shapes, factors.targets, factors.rank, train, head)
            manifest = validate(
                Manifest(
                    protocol=PROTOCOL_VERSION,
                    run=Run(
                        name=name or run.resolve().name,
                        rounds=rounds,
                        nonce=secrets.token_hex(16),
                        staleness=staleness,
                        pipeline=int(pipeline),
                        signer=Signer(signing_key).public,
                    ),
                    base=base,
                    task=trained,
                    adapter=Adapter(
                        targets=factors.targets,
                        rank=factors.rank,
                        alpha=factors.alpha,
                        train=train,
                        start="" if adapter is None else adapter_digest(adapter),
                        size=layout.size,
                        layout_digest=layout.digest().hex(),
                    ),
                    agents=Agents(count=agents, assignment=assignment),
                    directions=Directions(
                        policy=policy,
                        groups=(_GROUPS if policy == "groups" else 1) if groups is None else groups,
                        combine=combine,
                        trim=(_TRIM if combine == "trimmed" else 0) if trim is None else trim,
                        pool_size=pool_size,
                        pool_draw=pool_draw,
                    ),
                    probe=Probing(
                        epsilon=_EPSILON if epsilon is None else epsilon,
                        directions=directions,
                        batch_size=batch_size,
                        sequence_length=sequence_length,
                        sides=(1 if one_sided and directions // local_steps >= _ONE_SIDED_FROM else 2)
                        if sides is None
                        else sides,
                        local_steps=local_steps,
                        estimators=cast(tuple[Estimator, ...], tuple(estimators.split(","))),
                    ),
                    moves=Moves(projections=moves, **of_moves),
                    codes=Coding(bits=code_bits),  # type: ignore[arg-type]  # validate() checks
                    schedule=Schedule(
                        step=_STEPS[train] if step is None else step,
                        decay=decay,
                        warm_up=warm_up,
                        half_life=_half_life(half_life, decay, rounds),
                        normalised=normalised,
                        smoothing=2,
                        first_exponent=-4,
                        full_votes=min(64 * local_steps, 65536) if full_votes is None else full_votes,
                        momentum=momentum,
                        weight_decay=weight_decay,
                    ),
                    parity=Parity(digest_every=digest_every, share_loss=share_loss),
                    audit=Audits(rows=() if audit is None else audit_rows(audit)),
                )
            )
        except (base_files.BaseFilesError, AdapterFilesError):
            raise
        except ValueError as error:
            raise ManifestError(str(error)) from error
        config = validate_config(ServiceConfig(host=host, port=port, quorum=quorum))
        check_capacity(config, manifest)
        _check_quantization(manifest, shapes)
        _check_step(manifest)
        _check_length(manifest, base_files.configuration(found.folder))
        if calibrate:
            if epsilon is not None:
                raise ManifestError("give --epsilon or --calibrate, not both: the second measures the first")
            directory.check_absent()
            own = ["--score", score] if score else []
            own += ["--adapter", str(adapter)] if adapter else []
            own += [part for each in column or () for part in ("--column", each)]
            proposed = proposed_epsilon(manifest, found.folder, calibrate, own)
            probing = msgspec.structs.replace(manifest.probe, epsilon=proposed)
            manifest = validate(msgspec.structs.replace(manifest, probe=probing))
            out.print(f"epsilon {proposed:g}, as measured", highlight=False)
        try:
            weights = initial_weights(
                layout, run_key(manifest.run_id), train, None if start is None else start.values
            )
        except ValueError as error:
            raise AdapterFilesError(f"{adapter}: {error}") from error
        directory.create(
            manifest, config, Replica(manifest, weights), invite_only=invite_only, signing_key=signing_key
        )
    out.print(f"Made {run}: run {manifest.run_id.hex()}", highlight=False, soft_wrap=True)
    out.print(
        f"{layout.size:,} trained parameters on {manifest.base.name}; {rounds} rounds of {directions} "
        f"direction{'s' * (directions > 1)} a node{f', for each of {agents} agents' if agents > 1 else ''}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"Next: zo-coordinator serve {run}", highlight=False, soft_wrap=True)


def _half_life(given: int | None, decay: Decay, rounds: int) -> int:
    """What the manifest says of it."""
    if given is not None:
        return given
    return -(-rounds // 4) if decay == "halving" else 0


def _check_step(manifest: Manifest) -> None:
    """Refuse a step with which no weight would ever move."""
    if step_rule(manifest).step == 0:
        smallest = 2.0 ** -step_bits(manifest.schedule)
        raise ManifestError(
            f"schedule.step = {manifest.schedule.step:g} is rounded to 0, and nothing would be learnt; the smallest is "
            f"{smallest:.3g}"
        )


def _check_length(manifest: Manifest, configuration: Mapping[str, Any]) -> None:
    """Refuse sequences that no node's model could take."""
    longest = configuration.get("max_position_embeddings")
    if type(longest) is int and manifest.probe.sequence_length > longest:
        raise ManifestError(
            f"probe.sequence_length = {manifest.probe.sequence_length}: the base takes at most {longest} tokens; give "
            "--sequence-length"
        )


def _check_quantization(manifest: Manifest, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse what no node on a CPU could load; only say so where a node may choose for itself."""
    base = manifest.base
    try:
        check_shapes(base.quantize, base_files.layers_only(shapes), base.skip_quantize)
    except ValueError as error:
        if not base.any_quantization:
            raise ManifestError(str(error)) from error
        err.print(f"note, for nodes without a GPU: {error}", style="yellow", markup=False, highlight=False)
