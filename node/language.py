"""The trainer of a real node: base, adapter and private data, put together as a manifest asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from node.adapter import Adapter, brings_head, with_adapter
from node.base import Base, BaseError, load_base
from node.calibration import Row, calibrate
from node.completions import read_completions
from node.curvature import Curvature
from node.data import Sequences, read_windows
from node.estimators import (
    FIRST_ORDER,
    SPSA,
    Choice,
    EstimatorError,
    Trial,
    Wanted,
    allowed,
    check,
    choose,
    is_right,
)
from node.labelled import read_labelled
from node.losses import evaluate
from node.memory import PROBING, memory_explained
from node.mixture import Mixture
from node.moves import Mover
from node.objectives import objective
from node.privacy import Mechanism
from node.probe import Probe, Probed
from node.quantization import Form
from node.records import DataError
from node.rehearsal import Rehearsal, rehearse, try_out
from node.scores import Score
from node.start import start_of
from node.tasks import Mix
from transport.adapter_files import Start
from zo import kernels
from zo.directions import AUDIT, Direction, run_key
from zo.initial import initial_weights
from zo.manifest import MOVES, Manifest, Task, usual_estimator
from zo.naming import naming
from zo.spsa import one_sided, two_sided

_FLOATS: Final = "would hold this quantised base in floats; name it to have that"


class LanguageTrainer:
    """Measures the loss of a model on private data."""

    def __init__(
        self,
        manifest: Manifest,
        base: Base,
        windows: Sequences,
        held_out: Sequences | None,
        *,
        private_seed: int,
        threads: int,
        start: Path | None = None,
        score: Score | None = None,
        warn: Callable[[str], None] = lambda _: None,
        mechanism: Mechanism | None = None,
    ) -> None:
        """Put the adapter into the base, and check that both are the run's.

        Args:
            manifest: of the run.
            base: freshly loaded.
            windows: private training data, of the manifest's sequence length.
            held_out: what `evaluate` measures; None if nothing.
            private_seed: decides batches and rounding; never leaves the node.
            threads: for the integer kernels; torch's are set when the base is loaded.
            start: directory of the PEFT adapter that the run starts from, if it does.
            score: the node's callable, if that is the run's objective.
            warn: called if a score is not finite, or slopes are measured otherwise from now on.
            mechanism: makes what is measured differentially private; None: it is as measured.

        Raises:
            ScoreError: there is a callable and the run wants none, or the other way round.
            DataError: prompts are too long for what the model is to say after them.
            BaseError: the adapter that the manifest describes does not come out of this base, or `start` is not it.
        """
        kernels.set_threads(threads)
        self._manifest = manifest
        self._windows = windows
        self._quantization = base.quantization
        self._mover: Mover | None = None
        self._warn = warn
        self._held_out = held_out
        self._objective = objective(manifest.task, base, windows, score, warn)
        if held_out is not None:
            objective(manifest.task, base, held_out, score)  # checks that these prompts fit as well
        self._start = start_of(manifest, start, base)
        self._adapter = adapt(base, manifest, self._start)
        self._probe = Probe(
            self._adapter,
            windows,
            key=run_key(manifest.run_id),
            epsilon=manifest.probe.epsilon,
            directions=manifest.probe.directions,
            batch_size=manifest.probe.batch_size,
            seed=private_seed,
            sides=manifest.probe.sides,
            local_steps=manifest.probe.local_steps,
            bits=manifest.codes.bits,
            naming=naming(manifest),
            samples_per_round=manifest.samples_per_round,
            objective=self._objective,
            mechanism=mechanism,
        )

        self._public = self._public_probe(base, private_seed, score)

    def _public_probe(self, base: Base, seed: int, score: Score | None) -> Probe | None:
        """A probe of the manifest's public rows; None if it has none.

        Raises:
            DataError: they are no rows of this run's task.
        """
        manifest = self._manifest
        if not manifest.audit.rows:
            return None
        with TemporaryDirectory() as folder:
            file = Path(folder) / "audit.jsonl"
            file.write_text("\n".join(manifest.audit.rows) + "\n", "utf-8")
            try:
                rows = read_data([file], base, manifest.task, manifest.probe.sequence_length)
                objective(manifest.task, base, rows, score)  # checks that these prompts fit as well
            except DataError as error:
                raise DataError(f"the public rows of the run's manifest (audit.rows): {error}") from error
        return Probe(
            self._adapter,
            rows,
            key=run_key(manifest.run_id),
            epsilon=manifest.probe.epsilon,
            directions=1,
            batch_size=manifest.probe.batch_size,
            seed=seed,  # decides nothing: all rows are taken
            objective=self._objective,
        )

    def initial_weights(self) -> NDArray[np.int32]:
        """The weights of round 0: (size,) int32."""
        key = run_key(self._manifest.run_id)
        start = None if self._start is None else self._start.values
        return initial_weights(self._adapter.layout, key, self._manifest.adapter.train, start)

    @memory_explained("to probe", PROBING)
    def rehearse(self, at_once: int | None = None) -> Rehearsal:
        """Try noise and speed at the weights of round 0, and probe as was found from then on; see `rehearse`."""
        return rehearse(self._probe, self.initial_weights(), at_once)

    @property
    def estimator(self) -> str:
        """How slopes are measured, where that is not as the run's manifest says; else empty."""
        if self._mover is not None:
            return MOVES
        estimator = self._probe.estimator
        return "" if estimator == usual_estimator(self._manifest) else estimator

    @memory_explained("to probe", PROBING)
    def choose_estimator(self, wanted: Wanted | None, rehearsal: Rehearsal) -> str:
        """Measure slopes from now on as is wanted, or as is best here; which that is and why, in words.

        Args:
            wanted: by whom this node belongs to; None for the run's usual.
            rehearsal: of the run's usual.

        Raises:
            EstimatorError: the run does not allow it, or it cannot be had here.
        """
        manifest, probe = self._manifest, self._probe
        if wanted is None or wanted == SPSA:
            wanted = usual_estimator(manifest)
        if probe.mechanism is not None:
            if wanted not in ("auto", usual_estimator(manifest)):
                raise EstimatorError(
                    f"--dp-epsilon protects rows where slopes are measured as the run says, "
                    f"{usual_estimator(manifest)}; got --estimator {wanted}"
                )
            wanted = usual_estimator(manifest)
        check(wanted, manifest)
        weights, why = self.initial_weights(), ""
        if wanted == "auto":
            has_gradient = manifest.task.objective == "cross-entropy"
            may = allowed(manifest)
            trials: dict[Choice, Trial] = {}
            if has_gradient and self._quantization != "none" and usual_estimator(manifest) in may:
                # To try it would leave the base in floats for good, of which this node may not have the memory.
                untried = Trial(seconds=math.inf, error=math.inf, why_not=_FLOATS)
                trials, has_gradient = {"moves": untried, "backward": untried}, False
            if has_gradient and {"backward", "moves"} & set(may):
                trials["backward"] = try_out(probe, weights, "backward")
                trials["moves"] = self._of_a_move(trials["backward"])
            if has_gradient and "forward" in may:
                trials["forward"] = try_out(probe, weights, "forward")
            wanted, why = choose(usual_estimator(manifest), may, trials, rehearsal, manifest.probe.directions)
        elif wanted in FIRST_ORDER or wanted == "moves":
            trial = try_out(probe, weights, "forward" if wanted == "forward" else "backward")
            if wanted == "moves":
                trial = self._of_a_move(trial)
            if trial.why_not:
                raise EstimatorError(trial.why_not)
            if not is_right(trial, rehearsal):
                self._warn(
                    f"exact slopes are off by {trial.error:.2g} from differences, where L+ - L- is "
                    f"{rehearsal.signal:.2g}: this machine computes one of them wrongly"
                )
            why = f"{trial.seconds:.2g} s a round"
        self._mover = None
        if wanted == "moves":
            self._mover = Mover(self._adapter, self._windows, manifest, probe.key, probe.seed)
            return f"{wanted} ({why})"
        probe.estimator = wanted
        probe.curvature = Curvature() if wanted == "one-sided" and manifest.probe.directions > 1 else None
        return f"{wanted} ({why})" if why else wanted

    @memory_explained("to probe", PROBING)
    def calibrate(self, num_directions: int, progress: Callable[[int, int], None] | None = None) -> list[Row]:
        """How wrong slopes are at many epsilons, at the weights of round 0; see `node.calibration.calibrate`."""
        weights, sides = self.initial_weights(), self._manifest.probe.sides
        names = [Direction(0, sample) for sample in range(num_directions)]

        def differences(epsilon: float) -> NDArray[np.float64]:
            losses = self._probe.losses(weights, names, sides, epsilon)
            slopes = two_sided(losses, epsilon) if sides == 2 else one_sided(losses[:, 0], epsilon)
            return 2 * epsilon * slopes

        return calibrate(differences, sides, progress)

    @memory_explained("to probe", PROBING)
    def audit(self, weights: NDArray[np.int32], sample: int, agent: int = 0) -> tuple[float, float]:
        """The mean losses of the manifest's public rows at the weights plus and minus epsilon times a direction.

        Each row counts alike, and each batch is what it is on every node: whatever shares a pass elsewhere, here
        nothing does. Nothing of the node's own data enters.

        Args:
            weights: (size,) int32; left as they are.
            sample: names the direction, (AUDIT, sample, agent).
            agent: which adapter the weights are.
        """
        assert self._public is not None  # only a run that has rows asks
        rows = np.arange(self._public.windows.num_windows)
        losses = self._public.row_losses(weights, [Direction(AUDIT, sample, agent)], rows, sides=2)
        plus, minus = losses.mean(0)[0]
        return float(plus), float(minus)

    @memory_explained("to probe", PROBING)
    def probe(
        self,
        weights: NDArray[np.int32],
        round: int,
        node: int,
        exponent: int,
        agent: int = 0,
        walk_step: int = 0,
        importances: NDArray[np.int32] | None = None,
    ) -> Probed:
        """The codes of an agent's round."""
        if self._mover is not None:
            return self._mover.probe(weights, round, node, exponent, agent)
        before = self._probe.curvature
        probed = self._probe.probe(weights, round, node, exponent, agent, walk_step, importances)
        self._tell_of(before, self._probe.curvature)
        return probed

    def _of_a_move(self, trial: Trial) -> Trial:
        """What a round of moves takes, from what one of backward slopes does."""
        updates = self._manifest.moves.updates / self._manifest.probe.local_steps
        return replace(trial, seconds=trial.seconds * updates)

    def _tell_of(self, before: Curvature | None, after: Curvature | None) -> None:
        if before is None or after is None or before.needs_both_sides == after.needs_both_sides:
            return
        sides = "both sides from now on" if after.needs_both_sides else "one side again"
        self._warn(f"{after.share:.0%} of the variance of one-sided slopes is curvature: measuring {sides}")

    @memory_explained("for the held-out data", PROBING)
    def evaluate(self, weights: NDArray[np.int32]) -> float | None:
        """Held-out loss, of the run's objective; None if nothing is held out."""
        if self._held_out is None:
            return None
        batch_size = self._manifest.probe.batch_size
        return evaluate(
            self._adapter, weights, self._held_out, batch_size=batch_size, objective=self._objective
        )


def adapt(base: Base, manifest: Manifest, start: Start | None = None) -> Adapter:
    """The manifest's adapter inside the base.

    Raises:
        BaseError: the base does not have the modules, or its layout is not the manifest's.
    """
    wanted = manifest.adapter
    try:
        adapter = Adapter(
            base,
            key=run_key(manifest.run_id),
            targets=wanted.targets,
            rank=wanted.rank,
            alpha=wanted.alpha,
            train=wanted.train,
            start=start,
        )
    except ValueError as error:
        raise BaseError(f"the run's adapter does not fit the base {base.path}: {error}") from error
    if adapter.layout.digest().hex() != wanted.layout_digest:
        raise BaseError(
            f"the run trains {wanted.size} parameters, on this base they would be {adapter.size}, or laid out "
            "otherwise: the coordinator read the base's files differently from the loaded model"
        )
    return adapter


def open_model(
    path: str,
    adapters: Sequence[Path],
    task: Task,
    *,
    mix: Mix = "mean",
    threads: int,
    form: Form,
) -> tuple[Base, torch.nn.Module]:
    """A base, and the model for a task: the base itself, or with a PEFT adapter, or with several that are mixed.

    Raises:
        BaseError: one of them is missing or broken, or they do not belong together, or there is no trained head.
    """
    base = load_base(path, threads=threads, labels=task.head_labels, **form._asdict())
    if base.head is not None and not base.head.is_in_files:
        lacking = [each for each in adapters if not brings_head(each, base.head)]
        if lacking or not adapters:
            raise BaseError(
                f"the base {path} has no classification head of {len(task.labels)} labels"
                + (f", nor has {lacking[0]}" if lacking else "")
                + "; name an adapter that has one with --adapter"
            )
    if len(adapters) == 1:
        return base, with_adapter(base.model, adapters[0])
    if adapters:
        return base, Mixture(base.model, adapters, mix)
    return base, base.model


def read_data(
    paths: Sequence[Path],
    base: Base,
    task: Task,
    sequence_length: int | None,
    columns: Mapping[str, str] | None = None,
) -> Sequences:
    """The rows of some files, of the kind and the length that a run asks for.

    Args:
        paths: files as `node.reading` reads them.
        base: whose tokens they become.
        task: what the rows are.
        sequence_length: most tokens in a row; None for as many as usual.
        columns: what fields of a row are called in the files.

    Raises:
        DataError: the data cannot be used, or the base cannot take sequences of that length.
    """
    sequence_length = sequence_length or base.usual_length
    if base.max_sequence_length is not None and sequence_length > base.max_sequence_length:
        raise DataError(
            f"sequences are to have {sequence_length} tokens, the base takes {base.max_sequence_length}"
        )
    if task.kind == "completion":
        return read_completions(paths, base.tokenizer, sequence_length, columns)
    if task.labels:
        return read_labelled(paths, base.tokenizer, sequence_length, task, base.padding, columns)
    return read_windows(paths, base.tokenizer, sequence_length, columns)
