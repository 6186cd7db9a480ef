"""Rows of the benchmark of directions for people: what the targets come to, a table and three plots for each recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.recipes import variants as v
from benchmarks.recipes.course import passes_to

MOST_APART: Final = 0.01
"""Of a pool's end from that of private directions."""
MOST_BEHIND: Final = 0.02
"""Of local steps, from a step a round."""
LEAST_OF_ADAM: Final = 0.9
MOST_PAYLOAD: Final = 30_000
"""Bytes that a node sends, for that."""
WIRE_SHARE: Final = 0.1
_GROUPS: Final = (v.DIRECTIONS, v.CODES, v.NODES, v.LOCAL_STEPS, v.ESTIMATORS)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    key: str
    recipe: int
    group: str
    name: str
    nodes: int
    settings: dict[str, Any]
    points: Sequence[tuple[int, float]]
    """Forward passes of all nodes so far, and the held-out metric."""
    backwards: int
    """Backward passes, beside as many of the forward ones."""
    rounds: int
    payload_up: float
    """Bytes of a node over the whole run: what its reports say."""
    payload_down: float
    wire_up: float
    """The same with everything around it, acknowledgements included."""
    wire_down: float
    seed: int
    seconds: float
    date: str
    commit: str | None
    cpu: str

    @property
    def start(self) -> float:
        """The metric before the run."""
        return self.points[0][1]

    @property
    def end(self) -> float:
        """The metric after it."""
        return self.points[-1][1]

    @property
    def forwards(self) -> int:
        """Forward passes in all."""
        return self.points[-1][0]

    @property
    def wire(self) -> float:
        """Bytes on the wire, both ways."""
        return self.wire_up + self.wire_down


def best(rows: Sequence[Row]) -> list[Row]:
    """Of every variant the row that ends lowest, in the order of their first rows."""
    names = dict.fromkeys((row.group, row.name) for row in rows)
    return [min((r for r in rows if (r.group, r.name) == name), key=lambda r: r.end) for name in names]


def markdown(
    rows: Sequence[Row], titles: Mapping[int, tuple[str, str]], pictures: Mapping[int, str], *, quick: bool
) -> str:
    """The page; that of quick runs judges no targets."""
    lines = [
        "# Directions, codes, estimators, local steps",
        "",
        f"`python -m benchmarks.directions{' --quick' * quick} --out`: swarms of virtual nodes in one process, over "
        "the code path of real ones (probe, codes, cap, step rule, commit, replica). Everybody of a recipe has about "
        "the same number of forward passes. Steps follow one rule: so much for each vote, three times as much on a "
        "direction that all share, twice on one of a group; they were not tuned one by one, but on recipe 3, where "
        "passes are cheap, a quarter to twice as much was tried (with other estimators half as much and as much), and "
        "with local steps also the mean of the walks, in steps that are 4 to 16 times as large, and the best counts. "
        "One seed. Frames are made as the transport makes them; what is around them on the wire is computed by the "
        "formula that `zo-bench wire` confirms on an interface. Bytes are of one node, over the whole run.",
        "",
    ]
    for recipe, (title, metric) in titles.items():
        mine = best([row for row in rows if row.recipe == recipe])
        said = ["very short runs: they judge no targets"] if quick else targets(mine)
        lines += [f"## {title[0].upper()}{title[1:]}", "", *(f"- {each}" for each in said), ""]
        lines += [f"![{metric}]({pictures[recipe]})", ""]
        lines += [
            f"| | nodes | rounds | step | {metric} | forward passes | payload up | payload down | wire, both ways |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            *map(_line, mine),
            "",
        ]
    measured = sorted({f"{row.cpu}, {row.date}, commit {row.commit}" for row in rows})
    return "\n".join([*lines, f"Measured on: {'; '.join(measured)}.", ""])


def targets(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each target whose rows are there."""
    by_name = {row.name: row for row in rows}

    def found(*names: str) -> list[Row] | None:
        return [by_name[name] for name in names] if by_name.keys() >= set(names) else None

    if pair := found(v.INT8, v.ONE_BIT_LONGER):
        private, bit = pair
        needed = passes_to(bit.points, private.end)
        if needed is None:
            yield f"one bit does not come down to {private.end:.3f} in {v.LONGER} times the rounds: **not met**"
        else:
            yield (
                f"one bit comes down to the {private.end:.3f} of 8 bits in {needed / private.forwards:.2f} times the "
                f"rounds (at most {v.LONGER}): met"
            )
    if pair := found(v.INT8, v.POOL):
        private, pool = pair
        yield _verdict(
            f"a pool of 4,096 ends at {pool.end:.4g}, private directions at {private.end:.4g}: "
            f"{pool.end / private.end - 1:+.2%}",
            pool.end <= private.end * (1 + MOST_APART),
        )
    for steps in (8, 16, 64):
        if pair := found(v.LOCAL.format(1), v.LOCAL.format(steps)):
            one, local = pair
            text = (
                f"{steps} local steps end at {local.end:.4g}, one at {one.end:.4g}: {local.end / one.end - 1:+.2%}, in "
                f"{local.wire / one.wire:.3f} of its bytes on the wire"
            )
            is_met = local.end <= one.end * (1 + MOST_BEHIND) and local.wire <= WIRE_SHARE * one.wire
            yield _verdict(text, is_met) if steps == 16 else text
    if pair := found(v.ALL_MOVE, v.ADAM):
        moves, adam = pair
        share = (moves.start - moves.end) / (adam.start - adam.end)
        text = (
            f"moves reach {share:.1%} of Adam's improvement ({adam.start:.3f} → {adam.end:.3f}) with "
            f"{moves.payload_up / 1000:.1f} kB of payload sent per node"
        )
        is_met = share >= LEAST_OF_ADAM and moves.payload_up <= MOST_PAYLOAD
        yield _verdict(text, is_met) if moves.recipe == 1 else text
    if pair := found(v.HALF_MOVE, v.HALF_ALONE):
        mixed, alone = pair
        text = f"half moving and half probing end at {mixed.end:.4g}, the half that moves alone at {alone.end:.4g}"
        yield _verdict(text, mixed.end <= alone.end)


def _verdict(text: str, is_met: bool) -> str:
    return f"{text}: {'met' if is_met else '**not met**'}"


def _line(row: Row) -> str:
    step = row.settings.get("step", row.settings.get("rate"))
    sent = [f"{each:,.0f}" if each else "" for each in (row.payload_up, row.payload_down, row.wire)]
    passes = f"{row.forwards:,}" + (f" + {row.backwards:,} backward" if row.backwards else "")
    nodes = row.nodes if row.wire else ""
    name = row.name
    if row.group == v.LOCAL_STEPS and row.settings.get("full_votes", 1) == row.settings.get("local_steps", 1):
        name += ", mean of walks"
    return (
        f"| {name} | {nodes} | {row.rounds:,} | {step:.4g} | {row.start:.3f} → {row.end:.4g} | {passes} | "
        f"{' | '.join(sent)} |"
    )


def plot(rows: Sequence[Row], title: tuple[str, str], path: Path) -> None:
    """The metric against forward passes, payload up and bytes on the wire: a column each, a row for each group."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    chosen = best(rows)
    groups = [group for group in _GROUPS if any(row.group == group for row in chosen)]
    reference = next((row for row in chosen if row.name == v.INT8), None)
    figure, panels = plt.subplots(
        len(groups), 3, figsize=(13, 3.1 * len(groups)), sharey="row", squeeze=False, layout="constrained"
    )
    axes = (
        ("forward passes of all nodes", ""),
        ("payload sent by a node, bytes", "payload_up"),
        ("on the wire of a node, both ways, bytes", "wire"),
    )
    for group, line in zip(groups, panels, strict=True):
        mine = [row for row in chosen if row.group == group]
        if reference is not None and reference not in mine:
            mine = [reference, *mine]
        for panel, (label, total) in zip(line, axes, strict=True):
            for row in mine:
                style = "--" if row is reference and group != v.DIRECTIONS else "-"
                whole = getattr(row, total) if total else 0.0
                points = [(x * whole / row.forwards if whole else x, y) for x, y in row.points]
                shown = points[1:] if whole else points
                panel.plot(*zip(*shown, strict=True), style, marker=".", label=row.name)
            if total:
                panel.set_xscale("log")
                panel.xaxis.set_minor_formatter(NullFormatter())  # within a decade they would overlap
            else:
                panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.set_xlabel(label, fontsize=9)
            panel.grid(alpha=0.3)
        line[0].set_ylabel(f"{group}\n{title[1].partition(',')[0]}", fontsize=9)
        line[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(title[0], fontsize=11)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
