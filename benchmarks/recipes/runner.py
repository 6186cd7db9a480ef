"""Runs rows, or finds them among the results, and shows how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from time import perf_counter

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.recipes.baselines import FirstOrder, Mezo, first_order, mezo
from benchmarks.recipes.course import Course, Show
from benchmarks.recipes.problem import Problem
from benchmarks.recipes.results import Results, Row, key_of
from benchmarks.recipes.swarm import NO_MOVES, PRIVATE, Swarm, train
from node.device import device_of

_USUAL = (
    ("agents", 1),
    ("at_once", 0),
    ("bits", 8),
    ("full_votes", 1),
    ("local_steps", 1),
    ("on_all", False),
    ("policy", PRIVATE),
    ("estimators", ()),
    ("moves", NO_MOVES),
    ("max_share", 0.0),
)
"""Settings that go without saying: rows from before they could be made are still the same rows."""

Method = Swarm | Mezo | FirstOrder


def described(settings: Method) -> dict[str, object]:
    """A method's settings as JSON gives them back, without those that go without saying."""
    return {
        name: msgspec.to_builtins(value)
        for name, value in asdict(settings).items()
        if (name, value) not in _USUAL
    }


class Runner:
    """One call of a recipe: its rows so far are `keys`, in the order they were asked for."""

    def __init__(self, recipe: int, results: Results, *, again: bool, device: str = "cpu") -> None:
        """Take note of what is there.

        Args:
            recipe: its number.
            results: receives every row as soon as it is done.
            again: run what is there already once more.
            device: where runs compute.

        Raises:
            DeviceError: there is no such device.
        """
        self.keys: list[str] = []
        self._recipe = recipe
        self._results = results
        self._again = again
        self._device = str(device_of(device))
        self._err = Console(stderr=True)
        self._digests: dict[str, str] = {}

    def __call__(self, subject: str, problem: Problem, settings: Method, seed: int = 1) -> Row:
        """The row of a method on a problem, from the results or from a run."""
        digest = self._digests.setdefault(subject, problem.digest)
        form = asdict(problem.form) | {"targets": list(problem.form.targets)}  # as JSON gives it back
        how = described(settings)
        key = key_of(self._recipe, digest, form, settings.method, how, seed)
        is_new = key not in self.keys
        self.keys.append(key)
        known = self._results.find(key)
        if known is not None and not (self._again and is_new):
            return known
        started = perf_counter()
        course = self._watched(
            f"{subject}: {settings.method}", lambda show: _run(problem.on(self._device), settings, seed, show)
        )
        row = Row(
            key=key,
            subject=subject,
            method=settings.method,
            form=form,
            settings=how,
            seed=seed,
            points=tuple(course.points),
            seconds=round(perf_counter() - started, 1),
            date=datetime.now(UTC).date().isoformat(),
            commit=machine.commit(),
            cpu=computer(self._device),
            torch=machine.versions(["torch"])["torch"],
        )
        self._results.add(row)
        self._err.print(
            f"{subject}: {settings.method}, {row.start:.3f} → {row.end:.3f}, {row.forwards:,} forward passes, "
            f"{row.seconds:.0f} s",
            highlight=False,
        )
        return row

    def _watched(self, title: str, run: Callable[[Show], Course]) -> Course:
        """A run with a line that shows how far it is, and when it will be over."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metric]:.3f}"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self._err, transient=True, disable=not sys.stderr.isatty()
        ) as progress:
            task = progress.add_task(title, metric=float("nan"))
            return run(
                lambda done, total, metric: progress.update(task, completed=done, total=total, metric=metric)
            )


def _run(problem: Problem, settings: Method, seed: int, show: Show) -> Course:
    if isinstance(settings, Swarm):
        return train(problem, settings, seed, show).course
    if isinstance(settings, Mezo):
        return mezo(problem, settings, seed, show)
    return first_order(problem, settings, seed, show)


def computer(device: str) -> str:
    """The name of what computes there: the processor, or a GPU."""
    if device == "cpu":
        return machine.cpu()
    name: str = torch.cuda.get_device_name(device)
    return name
