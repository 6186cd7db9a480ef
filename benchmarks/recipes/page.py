"""A recipe's rows for people: a table, what the targets come to, and two plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Final

from benchmarks.recipes.course import passes_to
from benchmarks.recipes.results import Row

FLOAT_TOLERANCE: Final = 0.01
LEAST_SHARE: Final = 0.65
MOST_FORWARDS: Final = 20_000
"""Within which the least share is to be reached."""
NEARLY: Final = 0.99
"""Of those a run has that was made to use them all: they need not be whole rounds."""
MOST_POINTS: Final = 2.0
LEAST_LENGTH: Final = 0.2
"""Of a run of ours, for a run of MeZO to be compared with it."""
_COLOURS: Final = {
    "swarm, int8": "tab:blue",
    "swarm, float": "tab:cyan",
    "swarm, int8, 4 agents": "tab:purple",
    "MeZO": "tab:orange",
    "first order, Adam": "tab:green",
}


def markdown(title: str, command: str, metric: str, rows: Sequence[Row]) -> str:
    """The table of a recipe, and its targets, as a page."""
    lines = [
        f"# {title}",
        "",
        f"`{command}`; {metric}, before and after. Forward passes are those of all nodes together, without evaluation. "
        "Bytes are the scalars that all nodes send up, for first order one float32 gradient of the adapter a step; "
        "they are computed, and without frames. Every run is on one thread.",
        "",
        "| base | method | settings | seed | forward passes | bytes up | before | after | time | commit |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.subject} | {row.method} | {_settings(row)} | {row.seed} | {row.forwards:,} | "
        f"{row.points[-1].up_bytes:,} | {row.start:.3f} | {row.end:.3f} | {row.seconds:.0f} s | {row.commit} |"
        for row in rows
    ]
    lines += ["", "## Targets", "", *targets(rows, metric), ""]
    machines = sorted({f"{row.cpu}, torch {row.torch}, {row.date}" for row in rows})
    lines += [f"Measured on: {'; '.join(machines)}.", ""]
    return "\n".join(lines)


def targets(rows: Sequence[Row], metric: str) -> Iterator[str]:
    """One line for each target and subject, where the rows for it are there."""
    for subject in dict.fromkeys(row.subject for row in rows):
        mine = [row for row in rows if row.subject == subject]
        ours = best(mine, "swarm, int8")
        if ours is None:
            continue
        codes = [row for row in mine if row.method == "swarm, int8"]
        floats = [row for row in mine if row.method == "swarm, float"]
        for code, row in ((code, row) for code in codes for row in floats if _is_twin(code, row)):
            change = abs(code.end - row.end) / row.end
            yield _line(
                subject,
                f"int8 ends at {code.end:.3f}, float at {row.end:.3f}: {change:.2%} apart",
                change <= FLOAT_TOLERANCE,
            )
        adam = best(mine, "first order, Adam")
        if adam is not None and "error" in metric:
            points = 100 * (ours.end - adam.end)
            wrong = f"{ours.end:.1%} wrong, by first order {adam.end:.1%}"
            yield _line(subject, f"{wrong}: {points:.1f} points apart", points <= MOST_POINTS)
        elif adam is not None:
            share = (ours.start - ours.end) / (adam.start - adam.end)
            reached = (
                f"{share:.1%} of the improvement of first order ({adam.start - adam.end:.3f}) with {ours.forwards:,} "
                "forward passes"
            )
            if share < LEAST_SHARE and ours.forwards < NEARLY * MOST_FORWARDS:
                yield f"- {subject}, {reached}; no longer run was made"
            else:
                yield _line(subject, reached, share >= LEAST_SHARE)
            needed = forwards_to(ours, adam.start - LEAST_SHARE * (adam.start - adam.end))
            if needed is not None:
                yield f"- {subject}, {LEAST_SHARE:.0%} of it after about {needed:,.0f} forward passes"
        for mezo in [row for row in mine if row.method == "MeZO"]:
            if mezo.forwards < LEAST_LENGTH * ours.forwards:
                continue  # it was for choosing the rate
            lowest = min(mezo.points, key=lambda point: point.metric)
            if not lowest.forwards:
                continue  # it never was below its start
            its = f"MeZO's lowest, {lowest.metric:.3f} after {lowest.forwards:,} at rate {mezo.settings['rate']:g}"
            found = [needed for row in codes if (needed := forwards_to(row, lowest.metric)) is not None]
            if found:
                share = min(found) / lowest.forwards
                yield _line(subject, f"{its}, after about {min(found):,.0f}: {share:.2f} of them", share <= 1)
            else:
                yield _line(subject, f"{its}, was not reached", False)


def best(rows: Sequence[Row], method: str) -> Row | None:
    """The row of a method that ends lowest."""
    return min((row for row in rows if row.method == method), key=lambda row: row.end, default=None)


def forwards_to(row: Row, metric: float) -> float | None:
    """After how many forward passes a run came down to a metric; None if it never did."""
    return passes_to([(point.forwards, point.metric) for point in row.points], metric)


def plot(rows: Sequence[Row], metric: str, forwards_path: Path, bytes_path: Path) -> None:
    """Two pictures: the held-out metric against forward passes, and against bytes, one panel for each subject."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    subjects = list(dict.fromkeys(row.subject for row in rows))
    wide = min(2, len(subjects))
    tall = -(-len(subjects) // wide)
    for path, axis, label in (
        (forwards_path, "forwards", "forward passes of all nodes (first order: and as many backward)"),
        (bytes_path, "up_bytes", "bytes up, all nodes"),
    ):
        figure, panels = plt.subplots(
            tall, wide, figsize=(5.5 * wide, 3.8 * tall), squeeze=False, layout="constrained"
        )
        for panel, subject in zip(panels.flat, subjects, strict=False):
            for method, colour in _COLOURS.items():
                chosen = best([row for row in rows if row.subject == subject], method)
                if chosen is None:
                    continue
                points = [point for point in chosen.points if getattr(point, axis) or axis == "forwards"]
                panel.plot(
                    [getattr(point, axis) for point in points],
                    [point.metric for point in points],
                    marker=".",
                    color=colour,
                    linestyle="--" if method == "swarm, float" else "-",
                    label=method,
                )
            panel.set_title(subject, fontsize=10)
            if axis == "up_bytes":
                panel.set_xscale("log")
            else:
                panel.xaxis.set_major_locator(MaxNLocator(6))
                panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.set_xlabel(label)
            panel.set_ylabel(fill(metric, 44))
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
        for panel in list(panels.flat)[len(subjects) :]:
            panel.set_axis_off()
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)


def _is_twin(row: Row, other: Row) -> bool:
    """Whether two rows differ in their scalars alone."""
    return (row.form, row.seed, row.settings | {"scalars": ""}) == (
        other.form,
        other.seed,
        other.settings | {"scalars": ""},
    )


def _settings(row: Row) -> str:
    shown = {name: value for name, value in row.settings.items() if name not in ("scalars", "smoothing")}
    form = row.form
    size = f"batch {form['batch_size']} × {form['sequence_length']}"
    return ", ".join([*(f"{name} {_short(value)}" for name, value in shown.items()), size])


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(subject: str, text: str, is_met: bool) -> str:
    return f"- {'met' if is_met else '**not met**'}: {subject}, {text}"
