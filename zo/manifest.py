"""The run manifest: all that every node must share, in one immutable value whose hash names the run.

What only the coordinator decides from day to day (address, quorum, deadlines) is not here: see coordinator/config.py.
A node cannot set any of this, so it cannot diverge by a setting.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from zo.quantization import Dtype, Kind
from zo.toml import explain

RUN_ID_BYTES: Final = 16
MAX_AGENTS: Final = 128
MAX_AUDIT_CHARACTERS: Final = 32_768
_MAX_SAMPLES: Final = 2**32
TaskKind = Literal["text", "completion", "verbalizer", "head"]
TEXT_PLACE: Final = "{text}"
DEFAULT_TEMPLATE: Final = "{text}\nAnswer:"
Decay = Literal["constant", "linear", "cosine", "halving"]
Estimator = Literal["two-sided", "one-sided", "forward", "backward"]
"""How a node measures slopes: from losses on both sides, or on one; exactly by forward mode, or by a backward pass."""
ESTIMATORS: Final[tuple[Estimator, ...]] = get_args(Estimator)
MOVES: Final = "moves"
"""What a node measures by that reports moves, where the run allows them."""
Objective = Literal["cross-entropy", "accuracy", "token-f1", "exact-match", "callable"]
Policy = Literal["private", "pool", "shared", "groups"]
Combination = Literal["mean", "median", "trimmed", "majority"]
DEFAULT_POOL: Final = 4096
MAX_GROUPS: Final = 252
"""As many names as are reserved for them (`directions.GROUP_0`)."""
GENERATED: Final[frozenset[Objective]] = frozenset({"token-f1", "exact-match", "callable"})
"""Objectives that judge what the model says after a prompt."""
Hex16 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]


class ManifestError(ValueError):
    """A manifest that cannot be right: the field, its value and what would be right are in the message."""


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the run is called and how long it lasts."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            description="A name for people; nothing depends on it.",
        ),
    ]
    rounds: Annotated[
        int,
        Meta(
            ge=1, le=100_000_000, description="Rounds until the run is finished; the step decays towards it."
        ),
    ]
    staleness: Annotated[
        int,
        Meta(
            ge=0,
            le=1,
            description="1: a report that comes too late for its round counts in the next one; 0: it is dropped.",
        ),
    ] = 0
    pipeline: Annotated[
        int,
        Meta(
            ge=0,
            le=1,
            description="Rounds that a node measures ahead of the commits it has: 1: the next one, while the commit of "
            "this one is on its way; 0: none. Exponents are said as many rounds earlier.",
        ),
    ] = 0
    nonce: Annotated[
        Hex16,
        Meta(description="Drawn at init, so that two runs of equal settings have different directions."),
    ]
    signer: Annotated[
        str,
        Meta(
            pattern=r"^([0-9a-f]{64})?$",
            description="Ed25519 public key of the coordinator's seals: nodes refuse a history that it has not signed. "
            "Empty: nothing is signed, as in a simulation.",
        ),
    ] = ""


class BaseModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The frozen model all nodes must hold."""

    name: Annotated[
        str,
        Meta(
            min_length=1, max_length=256, description="Name of the base, for people and for error messages."
        ),
    ]
    revision: Annotated[
        str,
        Meta(
            max_length=256,
            description="Commit on the Hugging Face hub that init read; empty if the base was a directory. "
            "For people and for error messages: the digests decide.",
        ),
    ] = ""
    digest: Annotated[
        Hex16,
        Meta(
            description="BLAKE2b-128 over config.json and the safetensors files; a node with another is refused."
        ),
    ]
    tokenizer_digest: Annotated[
        Hex16, Meta(description="BLAKE2b-128 over the tokenizer's files and its chat template; likewise.")
    ]
    quantize: Annotated[
        Kind,
        Meta(
            description="How nodes hold the base's linear layers: none (as in its files), int8, or 4 bit as nf4 or fp4."
        ),
    ] = "none"
    skip_quantize: Annotated[
        tuple[str, ...],
        Meta(max_length=64, description="Linear modules left unquantised: last parts of their names."),
    ] = ()
    dtype: Annotated[
        Dtype,
        Meta(description="What nodes compute the base in; what is trained stays float32."),
    ] = "float32"
    any_quantization: Annotated[
        bool,
        Meta(
            description="Whether a node may choose another quantisation or dtype for itself. Its losses then differ a "
            "little from the others', the weights do not."
        ),
    ] = False


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the nodes' private data is, and what the loss is taken on."""

    kind: Annotated[
        TaskKind,
        Meta(
            description="text: plain text, every token is predicted; completion: rows of prompt and completion, only "
            "the completion is predicted; verbalizer: rows of text and label, predicted as the word that the language "
            "model says next; head: the same, predicted by a linear head on the base."
        ),
    ] = "text"
    labels: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...],
        Meta(max_length=1024, description="Labels as they stand in the data, in the order of their logits."),
    ] = ()
    words: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...],
        Meta(max_length=1024, description="Of a verbalizer: the word that stands for each label."),
    ] = ()
    template: Annotated[
        str,
        Meta(
            max_length=16384,
            description="Of a verbalizer: what the model reads before it says the word, with {text} for the row's "
            "text. White space at its end goes between it and the word; a space, if there is none.",
        ),
    ] = ""
    objective: Annotated[
        Objective,
        Meta(
            description="What the loss is: cross-entropy, or one less a score that needs no gradient: accuracy of next "
            "tokens or of labels; token-f1 or exact-match of what the model says after a prompt, against the "
            "completion; or a callable that each node has of its own."
        ),
    ] = "cross-entropy"
    score: Annotated[
        str,
        Meta(
            max_length=256,
            description="Of a callable: its name, for people. A node never loads code because this says so.",
        ),
    ] = ""
    max_new_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=65536,
            description="Most tokens that the model says after a prompt, where that is judged.",
        ),
    ] = 32

    @property
    def head_labels(self) -> tuple[str, ...] | None:
        """The labels of a base with a head; None if it has none."""
        return self.labels if self.kind == "head" else None

    def __post_init__(self) -> None:
        """Check that there are labels, words, a template and prompts where kind and objective ask for them.

        Raises:
            ValueError: there are not, or they are where they mean nothing, or a label or a word is not alone; the
                message says which.
        """
        if self.objective in GENERATED and self.kind != "completion":
            raise ValueError(
                f"objective = {self.objective!r} judges what is said after a prompt: it needs kind = 'completion', got "
                f"{self.kind!r}"
            )
        if (self.objective == "callable") != bool(self.score):
            raise ValueError(
                f"objective = {self.objective!r} and score = {self.score!r} do not go together: a callable has a name, "
                "and only a callable has"
            )
        if self.kind not in ("verbalizer", "head"):
            if self.labels:
                raise ValueError(
                    f"labels = {list(self.labels)!r} needs kind = 'verbalizer' or 'head', got {self.kind!r}"
                )
        elif len(self.labels) < 2:
            raise ValueError(f"a task with labels must name at least two, got {list(self.labels)!r}")
        _check_distinct("labels", self.labels)
        if self.kind != "verbalizer":
            if self.words or self.template:
                raise ValueError(f"words and template need kind = 'verbalizer', got {self.kind!r}")
            return
        if unspoken := self.labels[len(self.words) :]:
            raise ValueError(f"the label {unspoken[0]!r} has no word that stands for it")
        if len(self.words) > len(self.labels):
            raise ValueError(f"words has {len(self.words)} entries for {len(self.labels)} labels")
        if blank := [word for word in self.words if word != word.strip()]:
            raise ValueError(f"a word has no white space around it, got {blank[0]!r}")
        _check_distinct("words", self.words)
        if self.template.count(TEXT_PLACE) != 1:
            raise ValueError(f"template must hold {TEXT_PLACE} once, got {self.template!r}")


def _check_distinct(what: str, values: tuple[str, ...]) -> None:
    if twice := sorted({each for each in values if values.count(each) > 1}):
        raise ValueError(f"{what} names {', '.join(map(repr, twice))} more than once")


def task(kind: TaskKind, labels: Sequence[str] = (), template: str | None = None) -> Task:
    """The task that a command line describes.

    Args:
        kind: of the task.
        labels: each once; LABEL=WORD for a verbalizer.
        template: of a verbalizer; None for `DEFAULT_TEMPLATE`.

    Raises:
        ValueError: they do not make a task; the message says why.
    """
    if kind != "verbalizer":
        return Task(kind=kind, labels=tuple(labels), template=template or "")
    parts = [each.rpartition("=") for each in labels]
    if unspoken := [word for label, _, word in parts if not label]:
        raise ValueError(
            f"the label {unspoken[0]!r} has no word that stands for it: give LABEL=WORD, as {unspoken[0]}=yes"
        )
    return Task(
        kind=kind,
        labels=tuple(label for label, _, _ in parts),
        words=tuple(word for _, _, word in parts),
        template=DEFAULT_TEMPLATE if template is None else template,
    )


class Adapter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The LoRA adapter that is trained (Hu et al. 2021, arXiv 2106.09685), with the head if the task has one."""

    targets: Annotated[
        tuple[str, ...],
        Meta(
            max_length=64,
            description="Linear modules that get an adapter: last parts of their names. Empty: the head is trained "
            "alone.",
        ),
    ]
    rank: Annotated[int, Meta(ge=1, le=256, description="LoRA rank r.")]
    alpha: Annotated[
        float, Meta(gt=0, le=1024, description="LoRA alpha; the adapter's output is scaled by alpha / rank.")
    ]
    train: Annotated[
        Literal["B", "AB"],
        Meta(
            description='"B": A is frozen, generated from the run id, and B starts at zero; "AB": both are trained.'
        ),
    ]
    start: Annotated[
        str,
        Meta(
            pattern=r"^([0-9a-f]{32})?$",
            description="BLAKE2b-128 over the files of the PEFT adapter that the weights start from, which nodes must "
            "have; empty: they start from generated values.",
        ),
    ] = ""
    size: Annotated[
        int,
        Meta(ge=1, le=2**31, description="Number of trained parameters, from the base and the fields above."),
    ]
    layout_digest: Annotated[
        Hex16,
        Meta(
            description="Digest of the canonical layout (sorted names, shapes, offsets) of these parameters."
        ),
    ]


class Agents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many adapters are trained side by side on the one base, and who trains which."""

    count: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_AGENTS,
            description="Adapters trained on the one base, each with directions, weights and rounds of its own.",
        ),
    ] = 1
    assignment: Annotated[
        Literal["all", "by-node"],
        Meta(
            description="all: every node trains every agent; by-node: a node trains those that it names at join, and "
            "receives nothing of the others."
        ),
    ] = "all"


class Directions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which directions nodes measure, and what becomes of codes for the same one."""

    policy: Annotated[
        Policy,
        Meta(
            description="private: every node measures directions of its own; pool: every node draws its own from a "
            "pool that all share; shared: all measure the same, and a commit holds one combined code for each; groups: "
            "the same within each group."
        ),
    ] = "private"
    groups: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_GROUPS,
            description="Of the policy groups: how many; a node is in the group of its number modulo this.",
        ),
    ] = 1
    combine: Annotated[
        Combination,
        Meta(
            description="How codes for the same direction become one: their mean, their median, their trimmed mean, or "
            "the majority of their signs."
        ),
    ] = "mean"
    trim: Annotated[
        int,
        Meta(
            ge=0,
            le=49,
            description="Of the trimmed mean: percent of the codes to leave out at either end.",
        ),
    ] = 0
    pool_size: Annotated[
        int,
        Meta(ge=2, le=65536, description="Of a pool: directions in it; what is learnt are as many integers."),
    ] = DEFAULT_POOL
    pool_draw: Annotated[
        Literal["uniform", "importance"],
        Meta(
            description="Of a pool: whether all its directions are drawn as often, or in proportion to the mean "
            "magnitude of the codes that they had."
        ),
    ] = "uniform"

    @property
    def are_combined(self) -> bool:
        """Whether nodes share directions, so that commits hold combined codes."""
        return self.policy in ("shared", "groups")

    def __post_init__(self) -> None:
        """Check that nothing is set that means nothing.

        Raises:
            ValueError: something is; the message says what it would need.
        """
        if (self.policy == "groups") != (self.groups > 1):
            raise ValueError(
                f"policy = {self.policy!r} and groups = {self.groups} do not go together: groups are at least 2, and "
                "only the policy groups has any"
            )
        if self.combine != "mean" and not self.are_combined:
            raise ValueError(
                f"combine = {self.combine!r} needs policy = 'shared' or 'groups', got {self.policy!r}"
            )
        if self.policy != "pool" and (self.pool_size, self.pool_draw) != (DEFAULT_POOL, "uniform"):
            raise ValueError(
                f"pool_size = {self.pool_size} and pool_draw = {self.pool_draw!r} need policy = 'pool', got "
                f"{self.policy!r}"
            )
        if (self.combine == "trimmed") != (self.trim > 0):
            raise ValueError(
                f"combine = {self.combine!r} and trim = {self.trim} do not go together: a trimmed mean leaves out at "
                "least 1 percent, and nothing else leaves out any"
            )


class Probing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a node measures its projected gradients (SPSA, Spall 1992)."""

    epsilon: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="Length of the probe: losses are taken at weights + epsilon z and weights - epsilon z.",
        ),
    ]
    directions: Annotated[
        int, Meta(ge=1, le=4096, description="Directions each node measures in a round; a code each.")
    ]
    batch_size: Annotated[int, Meta(ge=1, le=65536, description="Sequences in one private batch.")]
    sequence_length: Annotated[int, Meta(ge=2, le=1_048_576, description="Tokens in a sequence.")]
    sides: Annotated[
        int,
        Meta(
            ge=1,
            le=2,
            description="2: a slope is taken from the losses at weights + epsilon z and weights - epsilon z, each "
            "direction on a batch of its own; 1: from the loss at weights + epsilon z, less the mean over the node's "
            "directions of the round, which share one batch.",
        ),
    ] = 2
    local_steps: Annotated[
        int,
        Meta(
            ge=1,
            description="Steps that a node takes in a round on a copy of its own: each measures an equal share of its "
            "directions and follows their codes. The commit replays everyone's from the common weights.",
        ),
    ] = 1
    estimators: Annotated[
        tuple[Estimator, ...],
        Meta(
            min_length=1,
            description="How nodes may measure slopes, each for itself: two-sided, one-sided, forward (exactly, by "
            "forward mode) or backward (exactly, by backpropagation). Unless told otherwise, a node does as sides "
            "says.",
        ),
    ] = ESTIMATORS


class Coding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How slopes become codes."""

    bits: Annotated[
        Literal[8, 4, 1],
        Meta(
            description="Of a code on the wire and in the ledger: 8, 4 (two in a byte) or 1 (its sign alone, eight in "
            "a byte)."
        ),
    ] = 8


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the coordinator turns codes into steps; nodes only see the resulting integers."""

    step: Annotated[
        float,
        Meta(
            gt=0,
            le=4,
            description="Step in units of the weights: each round moves them by step times the mean of "
            "code / RMS(codes) times z, times the number of votes, but no more than full_votes. Not normalised: of "
            "slope times z.",
        ),
    ]
    decay: Annotated[
        Decay,
        Meta(
            description="How the step changes over the rounds: not at all; to 0, on a line or on half a wave of a "
            "cosine; or by half every half_life rounds."
        ),
    ]
    warm_up: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000_000,
            description="First rounds, in which the step grows on a line to its full size.",
        ),
    ] = 0
    half_life: Annotated[
        int, Meta(ge=0, le=100_000_000, description="Of the decay by halves: rounds from one to the next.")
    ] = 0
    normalised: Annotated[
        bool,
        Meta(
            description="Whether the step is divided by the RMS of the codes, so that it does not depend on the size "
            "of the slopes; else it is multiplied with the slopes as they are, as a learning rate is."
        ),
    ] = True
    smoothing: Annotated[
        int,
        Meta(
            ge=0, le=16, description="The mean square of the codes is averaged over about 2^smoothing rounds."
        ),
    ]
    first_exponent: Annotated[
        int,
        Meta(
            ge=-64,
            le=63,
            description="Exponent of the codes in round 0: one unit of code is 2^exponent of slope. It adapts.",
        ),
    ]
    full_votes: Annotated[
        int,
        Meta(
            ge=1,
            le=65536,
            description="Up to so many votes in a round, each adds a whole step; more of them share as many steps.",
        ),
    ] = 1
    momentum: Annotated[
        int,
        Meta(
            ge=0,
            le=16,
            description="0: none; k: codes move an aim, and each round the weights go 2^-k of the way to it: a "
            "momentum of 1 - 2^-k whose steps add up to the same.",
        ),
    ] = 0
    weight_decay: Annotated[
        int,
        Meta(
            ge=0,
            le=30,
            description="0: none; k: each round takes the weights 2^-k of the way back to where they started.",
        ),
    ] = 0

    @property
    def num_vectors(self) -> int:
        """How many vectors of the weights' size a replica holds: the weights, their aim, their start."""
        return 1 + bool(self.momentum) + bool(self.weight_decay)

    def __post_init__(self) -> None:
        """Check that there is a half-life where one is needed.

        Raises:
            ValueError: there is none, or it means nothing.
        """
        if (self.decay == "halving") != (self.half_life > 0):
            raise ValueError(
                f"decay = {self.decay!r} and half_life = {self.half_life} do not go together: halving needs a "
                "half_life of at least 1 round, and nothing else has one"
            )


class Moves(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How nodes that can train the base say where some steps of their own lead to, instead of slopes."""

    projections: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="Directions on which a node projects its move of a round; one code each. 0: no node may.",
        ),
    ] = 0
    updates: Annotated[
        int, Meta(ge=1, le=65536, description="Steps of the optimizer that make a move, each on a batch.")
    ] = 10
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Meta(description="What makes them; it starts anew in every round."),
    ] = "adamw"
    rate: Annotated[
        float,
        Meta(
            gt=0, le=10, description="Its learning rate, before warm-up and decay, which are the schedule's."
        ),
    ] = 0.003


class Parity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How nodes prove that they hold the same weights."""

    digest_every: Annotated[
        int, Meta(ge=1, le=64, description="Nodes report the digest of their weights every so many rounds.")
    ]
    share_loss: Annotated[
        bool,
        Meta(
            description="Whether that report also carries the node's recent mean loss. "
            "If false, only codes and digests leave a node."
        ),
    ]


class Audits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Public rows on which all nodes can be asked for the same losses, and compared."""

    rows: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=MAX_AUDIT_CHARACTERS)], ...],
        Meta(
            max_length=64,
            description="Public rows, each an object in JSON as in a node's .jsonl data. At random rounds nodes tell "
            "their two losses on all of them along a direction that the coordinator names. None: nobody is asked.",
        ),
    ] = ()

    def __post_init__(self) -> None:
        """Check that the manifest stays small: it travels to every node.

        Raises:
            ValueError: the rows are too long together.
        """
        length = sum(map(len, self.rows))
        if length > MAX_AUDIT_CHARACTERS:
            raise ValueError(
                f"rows must have at most {MAX_AUDIT_CHARACTERS:,} characters together, got {length:,}"
            )


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that every node of a run must share. Its hash is the run id, so it never changes."""

    protocol: Annotated[int, Meta(ge=1, le=65535, description="Version of the protocol and of this file.")]
    run: Run
    base: BaseModel
    task: Task = Task()
    adapter: Adapter
    agents: Agents = Agents()
    directions: Directions = Directions()
    probe: Probing
    moves: Moves = Moves()
    codes: Coding = Coding()
    schedule: Schedule
    parity: Parity
    audit: Audits = Audits()

    def __post_init__(self) -> None:
        """Check what the range of a single field cannot say.

        Raises:
            ValueError: the run would need more samples than there are names for directions, it leaves layers of an
                unquantised base unquantised, it trains nothing, its local steps do not share the directions evenly, one
                direction is to be compared with the mean of itself, it is over before its step has warmed up, or nodes
                would measure ahead of commits what depends on them.
        """
        if not self.adapter.targets and self.task.kind != "head":
            raise ValueError(
                "adapter.targets must name at least one module, got none: nothing would be trained"
            )
        if self.base.skip_quantize and self.base.quantize == "none":
            raise ValueError(
                f"base.skip_quantize = {list(self.base.skip_quantize)!r} needs base.quantize to be int8, nf4 or fp4: "
                "nothing is quantised otherwise"
            )
        if self.probe.directions % max(self.probe.local_steps, 1):  # no constructor has checked its range
            raise ValueError(
                f"probe.local_steps = {self.probe.local_steps} must divide probe.directions = {self.probe.directions}: "
                "every local step measures as many"
            )
        usual = usual_estimator(self)
        if self.probe.estimators and usual not in self.probe.estimators:
            raise ValueError(
                f"probe.estimators = {list(self.probe.estimators)!r} must name {usual!r}: probe.sides = "
                f"{self.probe.sides} is what nodes do that are not told otherwise"
            )
        if self.probe.sides == 1 and self.probe.directions == self.probe.local_steps:
            raise ValueError(
                f"probe.sides = 1 needs probe.directions to be at least {2 * self.probe.local_steps}, got "
                f"{self.probe.directions}: two in each local step, since a slope is what a direction's loss differs by "
                "from the mean of all"
            )
        if self.schedule.warm_up and self.schedule.warm_up >= self.run.rounds:
            raise ValueError(
                f"schedule.warm_up = {self.schedule.warm_up} must be less than run.rounds = {self.run.rounds}"
            )
        if self.run.staleness and self.directions.are_combined:
            raise ValueError(
                f"run.staleness = 1 needs directions.policy = 'private' or 'pool', got {self.directions.policy!r}: a "
                "late code is for another direction than those it would be combined with"
            )
        if self.run.pipeline and self.run.staleness:
            raise ValueError(
                "run.pipeline = 1 needs run.staleness = 0, got 1: behind late codes the node's next ones are on their "
                "way already, and a round takes one set of them"
            )
        if self.run.pipeline and self.directions.pool_draw == "importance":
            raise ValueError(
                "directions.pool_draw = 'importance' needs run.pipeline = 0, got 1: the importances by which a round's "
                "directions are drawn follow from a commit that nodes do not wait for"
            )
        if self.directions.pool_draw == "importance" and (self.run.staleness or self.codes.bits == 1):
            raise ValueError(
                f"directions.pool_draw = 'importance' needs run.staleness = 0 and codes.bits = 8 or 4, got "
                f"{self.run.staleness} and {self.codes.bits}: a late code was drawn by other importances, and signs "
                "have no magnitude"
            )
        if self.moves.projections and self.moves.projections == self.probe.directions:
            raise ValueError(
                f"moves.projections = {self.moves.projections} must differ from probe.directions: how many codes there "
                "are tells slopes from moves"
            )
        if self.moves.projections and self.task.objective != "cross-entropy":
            raise ValueError(
                f"moves.projections = {self.moves.projections} needs a gradient, and objective = "
                f"{self.task.objective!r} has none"
            )
        if self.moves.projections and self.directions.policy != "private":
            raise ValueError(
                f"moves.projections = {self.moves.projections} needs directions.policy = 'private', got "
                f"{self.directions.policy!r}: a move is projected on a node's own directions"
            )
        num_samples = self.run.rounds * self.samples_per_round
        if num_samples > _MAX_SAMPLES:
            is_of_moves = self.moves.projections > self.probe.directions
            what = "moves.projections" if is_of_moves else "probe.directions"
            raise ValueError(
                f"run.rounds = {self.run.rounds} times {what} = {self.samples_per_round} must be at most "
                f"{_MAX_SAMPLES}, got {num_samples}: a sample's number is a uint32"
            )

    @property
    def num_vectors(self) -> int:
        """How many vectors of the weights' size a replica holds. In a pool run momentum and decay are the pool's."""
        return 1 if self.directions.policy == "pool" else self.schedule.num_vectors

    @property
    def samples_per_round(self) -> int:
        """How many samples of a node a round takes up: the names of as many directions as it has of either class."""
        return max(self.probe.directions, self.moves.projections)

    def encode(self) -> bytes:
        """The canonical bytes, MessagePack in field order: what travels and what the run id is the hash of."""
        return msgspec.msgpack.encode(self)

    @property
    def run_id(self) -> bytes:
        """(16,) bytes, BLAKE2b-128 of the canonical bytes."""
        return run_id(self.encode())


def usual_estimator(manifest: Manifest) -> Estimator:
    """How nodes of a run measure slopes that are not told otherwise."""
    return "one-sided" if manifest.probe.sides == 1 else "two-sided"


def run_id(manifest_bytes: bytes) -> bytes:
    """The run id of a manifest's canonical bytes: (16,) bytes."""
    return hashlib.blake2b(manifest_bytes, digest_size=RUN_ID_BYTES, person=b"zo-run").digest()


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in canonical bytes.

    Raises:
        ManifestError: not a manifest, or not in its one canonical form; the message names the field.
    """
    manifest = _decode(data)
    if manifest.encode() != data:
        raise ManifestError(
            "not a run manifest: its bytes are not the canonical ones, so its id would be another"
        )
    return manifest


def parse_manifest(text: str) -> Manifest:
    """The manifest written as TOML.

    Raises:
        ManifestError: not TOML, a field missing, unknown or out of range; the message names the field.
    """
    try:
        return msgspec.toml.decode(text, type=Manifest)
    except msgspec.ValidationError as error:
        raise ManifestError(explain(error, msgspec.toml.decode(text), Manifest)) from error
    except msgspec.DecodeError as error:
        raise ManifestError(f"not TOML: {error}") from error


def validate(manifest: Manifest) -> Manifest:
    """The same manifest, its ranges and types checked (constructors of msgspec structs do not check them).

    Whole numbers in fields that are fractions become fractions: only then are its bytes the canonical ones.

    Raises:
        ManifestError: a field out of range; the message names the field.
    """
    return _decode(manifest.encode())


def _decode(data: bytes) -> Manifest:
    try:
        return msgspec.msgpack.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        raise ManifestError(f"not a run manifest: {_explained(error, data)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"not a run manifest: {error}") from error


def _explained(error: msgspec.ValidationError, data: bytes) -> str:
    try:
        return explain(error, msgspec.msgpack.decode(data), Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return str(error)  # wrong in more than one way: what was found first will do
