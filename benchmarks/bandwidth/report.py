"""The results for people: one page of Markdown, and one of HTML with its plots inside, that can be sent to anybody.

Decides what is shown of which rows; measures nothing. A part without results is named, and left out.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.bandwidth import link, plots, scale, systems, wire
from benchmarks.bandwidth.loads import PARAMETERS
from benchmarks.bandwidth.results import Results, Row
from benchmarks.rows import ResultsError
from transport.meter import si_bytes

PARTS: Final = ("wire", "session", "scale", "link", "target")
_MEASURED: Final = "✓"
BEGIN: Final = "<!-- made by `zo-bench report`; edit nothing here -->"
END: Final = "<!-- end of what `zo-bench report` made -->"
_ORIGIN: Final = "Machine, commit, versions, commands"
_STYLE: Final = """
body { font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', sans-serif; color: #1f2933; max-width: 62rem;
  margin: 3rem auto; padding: 0 1.2rem }
h1 { font-size: 1.9rem; margin-bottom: .2rem }
h2 { margin-top: 2.6rem; border-bottom: 1px solid #d9dee4; padding-bottom: .25rem }
.says { background: #f3f7fa; border-left: 4px solid #1d5f8f; padding: .6rem 1.4rem; margin: 1.6rem 0 }
.says h2 { margin: .2rem 0 .4rem; border: 0; font-size: 1.15rem }
.says li { margin: .35rem 0 }
p.lead, figcaption, th { color: #52606d }
figure { margin: 1.4rem 0 }
figure img { width: 100% }
figcaption { font-size: .9rem }
table { border-collapse: collapse; font-size: .88rem; margin: 1rem 0; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
th { font-weight: 600 }
th:first-child, td:first-child { text-align: left }
code { background: #f1f4f7; padding: .05rem .3rem; border-radius: 3px; font-size: .9em }
"""


@dataclass(frozen=True)
class Section:
    """A heading, what there is to say, a table and a plot."""

    title: str
    text: str
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    plot: bytes | None = None
    """PNG."""
    caption: str = ""


def sections(rows_by_part: dict[str, list[Row]]) -> list[Section]:
    """What the report consists of, in order."""
    makers: dict[str, Callable[[list[Row]], list[Section]]] = {
        "target": lambda rows: _target(rows, rows_by_part["link"]),
        "wire": _wire,
        "session": _session,
        "link": lambda rows: _link(rows, rows_by_part["target"]),
        "scale": _scale,
    }
    found: list[Section] = []
    for part, maker in makers.items():
        rows = rows_by_part[part]
        found += maker(rows) if rows else [Section(part, f"Not measured yet: `zo-bench {part} --out DIR`.")]
    return found


def load(directory: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of every part in a directory, and what to know of them: of other commits, or a file that is none."""
    rows_by_part: dict[str, list[Row]] = {}
    notes = []
    for part in PARTS:
        try:
            results = Results(part, directory)
        except ResultsError as error:
            rows_by_part[part] = []
            notes.append(f"{error}; the page goes without")
            continue
        rows_by_part[part] = list(results.rows.values())
        if foreign := results.foreign():
            notes.append(f"{part}: rows of other commits: {', '.join(foreign)}")
    return rows_by_part, notes


def provenance(rows_by_part: dict[str, list[Row]]) -> list[str]:
    """On what, when and how the rows were measured, a line each."""
    measured = [row["measured"] for rows in rows_by_part.values() for row in rows]
    if not measured:
        return ["Nothing has been measured yet."]

    def distinct(name: str) -> list[str]:
        return sorted({str(each[name]) for each in measured})

    versions = sorted(
        {f"{name} {found}" for each in measured for name, found in each["versions"].items() if found}
    )
    machines = sorted({f"{each['cpu']}, {each['num_cores']} cores" for each in measured})
    loads = [each["load"] for each in measured]
    commits = distinct("commit")
    return [
        f"Machine: {'; '.join(machines)}; load {min(loads):g} to {max(loads):g}: bytes do not depend on "
        "it, times do.",
        f"Commit{'s' if len(commits) > 1 else ''}: {', '.join(commits)}"
        + (". Rows of different commits stand side by side." if len(commits) > 1 else "."),
        f"Versions: {', '.join(versions)}.",
        f"Measured on {', '.join(distinct('date'))}; by: {'; '.join(f'`{each}`' for each in distinct('command'))}.",
    ]


def markdown(found: Sequence[Section], lines: Sequence[str], says: Sequence[str]) -> str:
    """The page without plots.

    Args:
        found: its sections.
        lines: where it is from (`provenance`).
        says: what it comes to (`summary`).
    """
    out = ["# What a byte buys: results", ""]
    if says:
        out += ["## What this says", "", *(f"- {each}" for each in says), ""]
    for section in found:
        out += [f"## {section.title}", "", section.text, ""]
        if section.rows:
            out += [*table(section.headings, section.rows), ""]
    return "\n".join([*out, f"## {_ORIGIN}", "", *(f"- {line}" for line in lines), ""])


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, the first column to the left."""
    marks = ["---", *["--:"] * (len(headings) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows)]


def page(found: Sequence[Section], lines: Sequence[str], says: Sequence[str]) -> str:
    """The page as HTML, with nothing that must be loaded from elsewhere. Arguments as of `markdown`."""
    body = [
        "<h1>What a byte buys</h1>",
        '<p class="lead">zo-swarm beside other systems, every byte counted.</p>',
    ]
    if says:
        points = "".join(f"<li>{_inline(each)}</li>" for each in says)
        body.append(f'<div class="says"><h2>What this says</h2><ul>{points}</ul></div>')
    for section in found:
        body += [f"<h2>{_inline(section.title)}</h2>", f"<p>{_inline(section.text)}</p>"]
        if section.plot is not None:
            image = base64.b64encode(section.plot).decode()
            body.append(
                f'<figure><img alt="{html.escape(section.title)}" src="data:image/png;base64,{image}">'
                f"<figcaption>{_inline(section.caption)}</figcaption></figure>"
            )
        if section.rows:
            heads = "".join(f"<th>{html.escape(each)}</th>" for each in section.headings)
            lines_ = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in section.rows]
            body.append(f"<table><tr>{heads}</tr>{''.join(f'<tr>{each}</tr>' for each in lines_)}</table>")
    body.append(f"<h2>{_ORIGIN}</h2>")
    body.append(f"<ul>{''.join(f'<li>{_inline(line)}</li>' for line in lines)}</ul>")
    head = f'<meta charset="utf-8"><title>What a byte buys</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _inline(text: str) -> str:
    """Text with `code` in it, as HTML."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


# ---- sections -------------------------------------------------------------------------------------------------------


def wire_table(rows: Sequence[Row]) -> list[str]:
    """The README's table: one node and sixteen, int8 codes, each node's own directions, with CURVE."""
    plain = [
        row for row in _usual(rows) if row["codes"] == "int8" and row["policy"] == "private" and row["curve"]
    ]
    chosen = [row for row in plain if row["nodes"] in (1, 16)]
    headings = (
        "nodes",
        "directions",
        "report: payload",
        "socket",
        "wire",
        "per direction",
        "commit: payload",
        "socket",
        "wire",
    )
    return table(headings, [_wire_cells(row) for row in chosen])


def inserted(text: str, lines: Sequence[str]) -> str:
    """A document with these lines between the marks.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks the marks {BEGIN} and {END}")
    return "\n".join([before + begin, "", *lines, "", end + after])


def _usual(rows: Sequence[Row]) -> list[Row]:
    """Rows with nodes that compute, in namespaces, in the order of their size."""
    chosen = [row for row in rows if row["think_ms"] >= 40 and not row["on"].startswith("LOOPBACK")]
    return sorted(
        chosen,
        key=lambda row: (
            row["policy"],
            -len(row["codes"]),
            not row["curve"],
            row["nodes"],
            row["directions"],
        ),
    )


def _wire_cells(row: Row) -> list[str]:
    up, down = (
        [f"{row[f'{layer}_{way}']:,.0f}" for layer in ("payload", "zmtp", "wire")] for way in ("up", "down")
    )
    return [
        str(row["nodes"]),
        str(row["directions"]),
        *up,
        f"{row['wire_up'] / row['directions']:.2f}",
        *down,
    ]


def _wire(rows: list[Row]) -> list[Section]:
    chosen = _usual(rows) or rows
    headings = (
        "policy",
        "codes",
        "CURVE",
        "nodes",
        "directions",
        "payload up",
        "socket",
        "wire",
        "a direction",
        "down",
        "socket",
        "wire",
    )
    cells = [
        [row["policy"], row["codes"], "on" if row["curve"] else "off", *_wire_cells(row)] for row in chosen
    ]
    text = (
        "Bytes per node and round. Up: a report, and the acknowledgement of the commit. Down: the commit. Measured "
        "with a real coordinator and the real session, by an interface; payloads are within 5 % of theory, or "
        "less where narrow codes that all share are squeezed. Rows "
        "without CURVE are the same frames over bare sockets: the product has no such mode."
    )
    caption = "Bytes of a round by layer: up (left) and down (right), int8, private directions, with CURVE."
    return [Section("A round on the wire", text, headings, cells, plots.layers(chosen), caption)]


def _session(rows: list[Row]) -> list[Section]:
    headings = (
        "what",
        "payload up",
        "socket up",
        "wire up",
        "payload down",
        "socket down",
        "wire down",
        "wire, B/s",
    )
    cells = []
    for row in rows:
        counts = [
            f"{row[f'{layer}_{way}']:,.0f}" for way in ("up", "down") for layer in ("payload", "tcp", "wire")
        ]
        cells.append([row["what"], *counts, wire.idle_rate(row)])
    text = (
        "Bytes of one node. To join with a ticket takes three connections: the node's own key, which is not admitted "
        "yet, the ticket's, and its own again. Payload and socket are those of the last; the wire has all."
    )
    return [Section("Joining, being idle, leaving", text, headings, cells)]


def _link(rows: list[Row], targets: list[Row]) -> list[Section]:
    from benchmarks.bandwidth import loads  # brings torch

    exchanges = loads.exchanges_to_target(targets)
    ordered = [
        link.with_target(row, exchanges.get(row["system"]))
        for row in sorted(rows, key=lambda row: (row["bits_per_s"], row["loss"]))
    ]
    text = (
        f"{link.NODES} nodes of ours, two of Flower, each behind a link of its own, emulated in user space, "
        f"{1000 * link.ROUND_TRIP_S:.0f} ms there and back. Nodes report at once, so exchanges an hour are what the "
        "link allows. Bytes are per node and exchange, with what TCP sends again. The target is recipe 1's with the "
        "small adapter; who did not reach it has no time."
    )
    return [Section("Thin, slow and lossy links", text, link.HEADINGS, [link.cells(row) for row in ordered])]


def _scale(rows: list[Row]) -> list[Section]:
    ordered = sorted(rows, key=lambda row: row["nodes"])
    text = "Light nodes with real sockets on the coordinator's machine, a round a second; bytes are per node and round."
    caption = "The coordinator's processor time a round, and its memory."
    return [
        Section(
            "How many nodes",
            text,
            scale.HEADINGS,
            [scale.cells(row) for row in ordered],
            plots.scale(ordered),
            caption,
        )
    ]


def _target(rows: list[Row], links: list[Row]) -> list[Section]:
    from benchmarks.bandwidth import target  # brings torch

    found = []
    for recipe, quick, rank in sorted({(row["recipe"], row["quick"], row["rank"]) for row in rows}):
        mine = [row for row in rows if (row["recipe"], row["quick"], row["rank"]) == (recipe, quick, rank)]
        chosen = target.best(mine)
        short = " (a short form, which shows that all of it works and no more)" if quick else ""
        metric = chosen[0]["metric"]
        text = (
            f"Recipe {recipe}{short}: held-out {metric} {chosen[0]['target']:g}, {max(row['nodes'] for row in chosen)} "
            f"nodes, an adapter of {chosen[0]['parameters']:,} parameters. Bytes are per node, joining included; "
            "passes are of all nodes. " + verdict(chosen)
        )
        good_at = {each.name: each.good_at for each in systems.systems(recipe, quick=False)}
        cells = [[*target.cells(row), good_at.get(row["system"]) or row["good_at"]] for row in chosen]
        title = f"To the same {metric}, {chosen[0]['parameters']:,} parameters" + (", short" if quick else "")
        caption = f"Held-out {metric} against bytes that a node sends (left) and forward passes of all nodes (right)."
        found.append(
            Section(title, text, (*target.HEADINGS, "good at"), cells, plots.courses(chosen), caption)
        )
        if links and any(row["reached"] for row in chosen):
            says = (
                f"With {_MEASURED}, from exchanges that were measured over the link; without, computed from the bytes "
                "that the run took and a round trip for each exchange, which is the least it could be. Nobody's "
                "computing is in it. The line is a day."
            )
            found.append(
                Section(
                    "Time to the target over thin links",
                    says,
                    *_times(chosen, links),
                    plots.times([(row, _course_times(row, links)) for row in chosen]),
                    says,
                )
            )
    return found


def verdict(chosen: Sequence[Row]) -> str:
    """Who needs fewer bytes and who fewer passes, in a sentence; empty unless ours and Flower both got there."""
    ours = [row for row in chosen if row["system"].startswith("ours") and row["reached"]]
    theirs = {row["system"]: row["reached"] for row in chosen if "Flower" in row["system"] and row["reached"]}
    if not ours or not theirs:
        return ""
    best = min(ours, key=lambda row: row["reached"]["wire_up"])
    # Floats are what Flower sends of itself; in 8 bits it is an app of ours.
    usual = min(theirs, key=lambda name: ("int8" in name, theirs[name]["wire_up"]))
    mine, other = best["reached"], theirs.pop(usual)

    def beside(hit: Row) -> str:
        ratio = hit["wire_up"] / mine["wire_up"]
        return f"{_times_as(ratio)} fewer" if ratio >= 1 else f"{_times_as(1 / ratio)} more"

    more = "".join(
        f" ({beside(hit)} than {name.partition(',')[0]}, {si_bytes(hit['wire_up'])})"
        for name, hit in theirs.items()
    )
    return (
        f"Ours ({best['system'].removeprefix('ours, ')}) sends {si_bytes(mine['wire_up'])} from a node, "
        f"{beside(other)} bytes up than {usual.partition(',')[0]} with Flower, {si_bytes(other['wire_up'])}{more}, and "
        f"takes {_times_as(mine['forwards'] / other['forwards'])} as many forward passes; FedAvg has as many backward."
    )


def _times_as(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def summary(rows_by_part: dict[str, list[Row]]) -> list[str]:
    """What all of it says, a sentence each, with figures that are in the rows."""
    found = []
    problems = _problems(rows_by_part["target"])
    if problems:
        from benchmarks.bandwidth import target  # brings torch
    for recipe, rank, mine in problems:
        chosen = target.best(mine)
        says = verdict(chosen)
        if says:
            found.append(
                f"To a held-out {chosen[0]['metric']} of {chosen[0]['target']:g}, recipe {recipe}, rank {rank}, "
                f"{chosen[0]['parameters']:,} parameters: {says[0].lower()}{says[1:]}"
            )
    usual = {
        (row["nodes"], row["directions"]): row
        for row in _usual(rows_by_part["wire"])
        if (row["codes"], row["policy"], row["curve"]) == ("int8", "private", True)
    }
    lone = usual.get((16, 1))
    if lone is not None:
        many = [
            f"{d} in one report cost {usual[16, d]['wire_up'] / d:.2f} B each"
            for d in (64, 256)
            if (16, d) in usual
        ]
        found.append(
            f"A round of 16 nodes with one direction each costs a node {lone['wire_up']:.0f} B up and "
            f"{lone['wire_down']:.0f} B down, everything counted; {', '.join(many)}."
        )
    rates = [each for each in map(wire.idle_rate, rows_by_part["session"]) if each]
    if rates:
        found.append(f"A node that only waits costs {rates[-1]} B/s, both ways.")
    kept = [row for row in rows_by_part["scale"] if row["keeps_up"]]
    if kept:
        most = max(kept, key=lambda row: row["nodes"])
        found.append(
            f"One coordinator keeps up with {most['nodes']:,} nodes that report once a second; it has "
            f"{most['cpu_share']:.0%} of a core to do and {most['memory_bytes'] / 1e6:,.0f} MB."
        )
    found += [
        f"With {row['nodes']:,} nodes there were {row['rounds_per_s']:.2f} rounds a second: {row['why']}."
        for row in rows_by_part["scale"]
        if not row["keeps_up"]
    ]
    return found


def _problems(rows: Sequence[Row]) -> list[tuple[int, int, list[Row]]]:
    """(recipe, rank, rows) of every problem that was measured in full."""
    names = sorted({(row["recipe"], row["rank"]) for row in rows if not row["quick"]})
    return [
        (
            recipe,
            rank,
            [row for row in rows if (row["recipe"], row["rank"], row["quick"]) == (recipe, rank, False)],
        )
        for recipe, rank in names
    ]


def _course_times(row: Row, links: Sequence[Row]) -> list[tuple[int, float]]:
    """(bits per second, seconds to the target) of a system over every link without loss."""
    hit = row["reached"]
    if hit is None:
        return []
    found = {
        rate: link.seconds_to(hit["exchange"], each) for rate, each in _measured_links(row, links).items()
    }
    for rate in {each["bits_per_s"] for each in links} - found.keys():
        way = link.Way(bits_per_s=rate, round_trip_s=link.ROUND_TRIP_S, loss=0.0)
        found[rate] = link.seconds_computed(hit["wire_up"], hit["wire_down"], hit["exchange"], way)
    return sorted(found.items())


def _measured_links(row: Row, links: Sequence[Row]) -> dict[int, Row]:
    """By its bits per second, every link without loss over which exchanges such as this row's were measured."""
    # A round of ours has the same bytes whatever the adapter; an exchange of others was measured with the small one.
    if row["system"] not in link.OURS and row["parameters"] != PARAMETERS:
        return {}
    return {
        each["bits_per_s"]: each
        for each in links
        if not each["loss"] and each["system"] == row["system"] and not each["on"].startswith("computed")
    }


def _times(chosen: Sequence[Row], links: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    rates = sorted({each["bits_per_s"] for each in links if not each["loss"]})
    cells = []
    for row in chosen:
        times, measured = dict(_course_times(row, links)), _measured_links(row, links)
        if times:
            marked = (duration(times[rate]) + f" {_MEASURED}" * (rate in measured) for rate in rates)
            cells.append([row["system"], *marked])
    return ["system", *(link.rate_text(rate) for rate in rates)], cells


def duration(seconds: float) -> str:
    """A time for people."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
