"""The plots of the report, as PNG: what is drawn of which rows, and how axes are labelled. One style for all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from benchmarks.bandwidth.results import Row
from transport.meter import si_bytes

DAY_S: Final = 86_400.0
INK, _SOFT, _FAINT = "#1f2933", "#7b8794", "#e7eaee"
_OURS: Final = ("#1d5f8f", "#4d94c4", "#8fc1e3")
_OTHERS: Final = ("#d97706", "#9d174d", "#4d7c0f", "#6d28d9")
_PUBLISHED: Final = ("#64748b", "#94a3b8", "#0f766e", "#a16207", "#b91c1c", "#475569")
_LAYERS: Final = {
    "payload": "#1d5f8f",
    "ZMTP and CURVE": "#8fc1e3",
    "TCP, IP, Ethernet, acknowledgements": "#d5dbe2",
}
_MARKS: Final = "osD^vP*X"
_BITS: Final = ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"), (1.0, "bit/s"))
_TIMES: Final = ((DAY_S, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_PASSES: Final = ((1e6, "M"), (1e3, "k"), (1.0, ""))


def quantity(value: float, units: Sequence[tuple[float, str]]) -> str:
    """A value in the largest unit that it fills, for an axis."""
    size, unit = next(((size, unit) for size, unit in units if value >= size), units[-1])
    return f"{value / size:.3g} {unit}".strip()


def courses(rows: Sequence[Row]) -> bytes:
    """Held-out loss of every system, against bytes up of a node and against forward passes of all nodes."""
    plt, figure, (left, right) = _figure(2, height=4.4)
    for panel, axis, label in (
        (left, "wire_up", "sent by a node, on the wire"),
        (right, "forwards", "forward passes, all nodes"),
    ):
        for row, look in _looks(rows):
            points = [point for point in row["points"] if point[axis] > 0]
            if points:
                panel.plot([each[axis] for each in points], [each["loss"] for each in points], **look)
            if row["reached"]:
                hit = row["reached"]
                panel.plot(
                    hit[axis], hit["loss"], "o", color=look["color"], markersize=9, fillstyle="none", zorder=5
                )
        _mark(panel, rows[0]["target"], f"target {rows[0]['target']:g}")
        panel.set_xscale("log")
        panel.set_xlabel(label)
    left.xaxis.set_major_formatter(lambda value, _: si_bytes(value))
    right.xaxis.set_major_formatter(lambda value, _: quantity(value, _PASSES))
    left.set_ylabel(f"held-out {rows[0]['metric']}")
    _legend(figure, left, columns=3)
    return _png(plt, figure)


def times(curves: Sequence[tuple[Row, list[tuple[int, float]]]]) -> bytes:
    """Time to the target over links: (row, its (bits per second, seconds)) of every system that has any."""
    plt, figure, (panel,) = _figure(1, width=8.4, height=4.4)
    points_by_system = {row["system"]: points for row, points in curves}
    for row, look in _looks([row for row, points in curves if points]):
        is_ours = row["system"].startswith("ours")
        look |= {"linestyle": "-" if is_ours else (0, (4, 2)), "markersize": 5}
        look["label"] += "" if is_ours else " (computed)"
        panel.plot(*zip(*points_by_system[row["system"]], strict=True), **look)
    _mark(panel, DAY_S, "a day")
    panel.set_xscale("log")
    panel.set_yscale("log")
    rates = sorted({rate for _, points in curves for rate, _ in points})
    panel.set_xticks(rates, [quantity(rate, _BITS) for rate in rates])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: quantity(value, _TIMES))
    low, high = panel.get_ylim()
    panel.set_yticks(
        [each for each in (1, 10, 60, 600, 3600, 36_000, DAY_S, 10 * DAY_S) if low <= each <= high]
    )
    panel.set_xlabel("a node's link")
    panel.set_ylabel("time to the target, computing left out")
    _legend(figure, panel, columns=3)
    return _png(plt, figure)


def layers(rows: Sequence[Row]) -> bytes | None:
    """Bytes of a round by layer, up and down, for the usual form with most nodes up to 16; None without such rows."""
    chosen = [row for row in rows if row["codes"] == "int8" and row["policy"] == "private" and row["curve"]]
    chosen = [row for row in chosen if row["nodes"] <= 16]
    if not chosen:
        return None
    most = max(row["nodes"] for row in chosen)
    chosen = [row for row in chosen if row["nodes"] == most]
    plt, figure, (left, right) = _figure(2, height=3.7)
    names = [f"{row['directions']}" for row in chosen]
    for panel, way, title in ((left, "up", "up: report"), (right, "down", "down: commit")):
        bottom = [0.0] * len(chosen)
        totals = [[row[f"{layer}_{way}"] for row in chosen] for layer in ("payload", "zmtp", "wire")]
        parts = [totals[0]]
        parts += [[b - a for a, b in zip(low, high, strict=True)] for low, high in pairwise(totals)]
        for (name, colour), heights in zip(_LAYERS.items(), parts, strict=True):
            panel.bar(names, heights, 0.62, bottom=bottom, color=colour, label=name)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for x, (total, row) in enumerate(zip(bottom, chosen, strict=True)):
            panel.annotate(
                f"{total:,.0f} B\n{quantity(total / row['directions'], _PASSES)} a direction",
                (x, total),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=INK,
                fontsize=8,
                linespacing=1.15,
            )
        panel.margins(y=0.2)
        panel.set_title(f"{title}, {most} nodes", fontsize=10, color=INK, loc="left")
        panel.set_xlabel("directions of a node in a round")
        panel.yaxis.set_major_formatter(lambda value, _: si_bytes(value))
        panel.grid(visible=False, axis="x")
    left.set_ylabel("per node and round")
    _legend(figure, left, columns=3)
    return _png(plt, figure)


def scale(rows: Sequence[Row]) -> bytes:
    """Processor time of a round and memory of the coordinator by nodes, and what share of the machine who takes."""
    plt, figure, panels = _figure(3, height=3.2)
    xs = [row["nodes"] for row in rows]
    series = (
        [row["cpu_ms_per_round"] for row in rows],
        [row["memory_bytes"] / 1e6 for row in rows],
        [row["rounds_per_s"] for row in rows],
    )
    for panel, ys, title in zip(
        panels, series, ("processor time a round, ms", "memory, MB", "rounds a second"), strict=True
    ):
        panel.plot(xs, ys, color=_OURS[0], marker="o", markersize=5, linewidth=1.8)
        panel.set_xscale("log")
        panel.set_xticks(xs, [f"{x:,}" for x in xs], fontsize=8)
        panel.minorticks_off()
        panel.set_xlabel("nodes")
        panel.set_title(title, fontsize=10, color=INK, loc="left")
        panel.set_ylim(0, 1.15 * max(ys))
    panels[0].set_yscale("log")
    panels[0].set_ylim(0.6 * min(series[0]), 1.7 * max(series[0]))
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[2].axhline(1.0, color=_SOFT, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    return _png(plt, figure)


def _mark(panel: Any, height: float, text: str) -> None:
    """A line across a panel, named at its right end."""
    panel.axhline(height, color=_SOFT, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    panel.annotate(
        text,
        (1.0, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=_SOFT,
        zorder=6,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
    )


def _looks(rows: Sequence[Row]) -> list[tuple[Row, dict[str, Any]]]:
    """Rows with how each is drawn: ours blue and strong, other systems in colour, published settings thin."""
    counts = {"ours": 0, "others": 0, "published": 0}
    found = []
    for index, row in enumerate(rows):
        name = row["system"]
        is_other = any(each in name for each in ("FedAvg", "Flower", "gloo", "DiLoCo"))
        kind = "ours" if name.startswith("ours") else "others" if is_other else "published"
        colours = {"ours": _OURS, "others": _OTHERS, "published": _PUBLISHED}[kind]
        look: dict[str, Any] = {
            "color": colours[counts[kind] % len(colours)],
            "linewidth": {"ours": 2.2, "others": 1.8, "published": 1.1}[kind],
            "marker": _MARKS[index % len(_MARKS)],
            "markersize": {"ours": 4.0, "others": 4.0, "published": 3.0}[kind],
            "label": name,
            "zorder": {"ours": 4, "others": 3, "published": 2}[kind],
        }
        counts[kind] += 1
        found.append((row, look))
    return found


def _figure(panels: int, width: float = 10.2, height: float = 3.7) -> tuple[Any, Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": _SOFT,
            "axes.labelcolor": INK,
            "xtick.color": _SOFT,
            "ytick.color": _SOFT,
            "axes.grid": True,
            "grid.color": _FAINT,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "figure.constrained_layout.w_pad": 0.12,
        }
    )
    figure, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)
    return plt, figure, list(axes[0])


def _legend(figure: Any, panel: Any, columns: int) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=9)


def _png(plt: Any, figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=170, metadata={"Software": None})
    plt.close(figure)
    return sink.getvalue()
