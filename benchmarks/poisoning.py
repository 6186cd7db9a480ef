"""What attackers inside the swarm do to what it learns, and what each defence leaves of that.

    python -m benchmarks.poisoning [--quick] [--out [DIR]]

Sixteen nodes in one process, over probe, codes, cap, step rule, commit and replica as they are in the field; four of
them send inverted, constant or maximal codes. Who is found out, by the tallies of codes or by public audits, reports no
more. Then the same attackers where nodes share directions, and codes are combined. What was run already is not run
again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.status import Status

from benchmarks import machine
from benchmarks import rows as rows_of
from benchmarks.command import add_out, command_line
from benchmarks.recipes import problem as problems
from benchmarks.recipes.catalogue import sentiment_problem
from benchmarks.recipes.problem import HeldOut, Problem
from benchmarks.recipes.results import key_of
from benchmarks.recipes.runner import described
from benchmarks.recipes.swarm import Swarm, make_manifest
from coordinator.consensus import Consensus, Losses, tolerance
from coordinator.influence import Influence
from coordinator.share import capped
from node.data import Sequences
from node.labelled import Labelled
from node.language import adapt
from node.losses import row_losses, row_misses
from node.objectives import objective
from node.probe import Probe
from transport.exits import Exit
from zo.codes import NO_VOTE
from zo.combine import combined
from zo.commit import Commit
from zo.directions import AUDIT, Direction, run_key
from zo.initial import initial_weights
from zo.manifest import Directions
from zo.naming import naming
from zo.packing import bits_of_commits, pack
from zo.replica import Replica
from zo.steps import step_rule
from zo.weights import to_float

NODES: Final = 16
ATTACKERS: Final = 4
ROWS: Final = 108
"""Of each node."""
SHARED_HELD_OUT: Final = 2693
HELD_OUT: Final = 436
"""Every second row of the development set."""
PUBLIC_ROWS: Final = 16
AUDIT_EVERY: Final = 8
NO_CAP: Final = 1000.0
Codes = NDArray[np.int8]


def _inverted(codes: Codes) -> Codes:
    return np.where(codes == NO_VOTE, NO_VOTE, -codes.astype(np.int16)).astype(np.int8)


ATTACKS: Final[dict[str, Callable[[Codes], Codes]]] = {
    "none": lambda codes: codes,
    "absent": lambda codes: codes[:0],
    "inverted": _inverted,
    "constant": lambda codes: np.full_like(codes, 32),
    "maximal": lambda codes: np.where(codes > 0, -127, 127).astype(np.int8),
}
"""What an attacker makes of the codes that an honest node in its place would send: nothing, in `absent`."""


@dataclass(frozen=True, kw_only=True)
class Defence:
    """What stands between an attacker's codes and the weights."""

    name: str
    max_share: float
    finds: bool
    """Whether nodes whose codes are out of line, or whose answers to public audits are, are shut out."""
    answers: Literal["honestly", "as it reports"] = "honestly"
    """How attackers answer audits. "As it reports" is what a broken machine does."""


BOUNDED: Final = Defence(name="codes are bounded", max_share=NO_CAP, finds=False)
CAPPED: Final = Defence(name="and a node's share is capped", max_share=2.0, finds=False)
FOUND: Final = Defence(name="and who is found is shut out", max_share=2.0, finds=True)
FAULTY: Final = Defence(
    name="and who is found is shut out; audits answered as it reports",
    max_share=2.0,
    finds=True,
    answers="as it reports",
)
RUNS: Final = (
    ("none", CAPPED),
    ("absent", CAPPED),
    *(
        (attack, defence)
        for attack in ("inverted", "constant", "maximal")
        for defence in (BOUNDED, CAPPED, FOUND)
    ),
    ("inverted", FAULTY),
)
"""Attack and defence of each run with private directions. The tallies find constant and maximal codes, whatever audits
are answered."""


POLICIES: Final[dict[str, tuple[Directions, Literal[8, 1]]]] = {
    "shared, mean": (Directions(policy="shared"), 8),
    "shared, trimmed mean, 25 %": (Directions(policy="shared", combine="trimmed", trim=25), 8),
    "shared, median": (Directions(policy="shared", combine="median"), 8),
    "shared, majority of signs": (Directions(policy="shared", combine="majority"), 1),
    "4 groups, median": (Directions(policy="groups", groups=4, combine="median"), 8),
    "2 groups, median": (Directions(policy="groups", groups=2, combine="median"), 8),
    "2 groups, trimmed mean, 25 %": (Directions(policy="groups", groups=2, combine="trimmed", trim=25), 8),
}
"""Policy and width of the codes of runs in which nodes share directions."""
SHARED_ATTACKS: Final = ("none", "inverted", "maximal")
MOST_POINTS: Final = 2.0
"""That the error may be above that of the honest swarm."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    key: str
    policy: str = "private"
    attack: str
    defence: str
    rounds: int
    points: list[tuple[int, float, float]]
    """Round, held-out loss in nats, and held-out error, a share of labels."""
    found: dict[int, int]
    """By node, attackers or not, the round in which it was found."""
    shares: list[float]
    """Of each round, the attackers' part of the squared length of all codes committed."""
    seconds: float
    date: str
    commit: str | None
    cpu: str


class Arena:
    """The swarm, for as many runs as are wanted: the same start, data and directions in each."""

    def __init__(self, problem: Problem, settings: Swarm, policy: str = "private") -> None:
        form, base = problem.form, problems.load(problem)
        self.settings = settings
        self.policy = policy
        self.manifest = make_manifest(base, form, settings, 1, problem.task)
        self.key = run_key(self.manifest.run_id)
        self.adapter = adapt(base, self.manifest)
        self.held_out = [HeldOut(problem.judged_by(each), self.adapter) for each in (row_losses, row_misses)]

        def probe(windows: Sequences, node: int) -> Probe:
            made = Probe(
                self.adapter,
                windows,
                key=self.key,
                epsilon=settings.epsilon,
                directions=settings.directions,
                batch_size=form.batch_size,
                seed=1000 + node,
                sides=settings.sides,
                bits=settings.bits,
                naming=naming(self.manifest),
                objective=objective(problem.task, base, windows),
            )
            made.answers = problem.known  # a node's batch is all of its rows, in every run
            return made

        self.probes = [probe(windows, node) for node, windows in enumerate(problem.private)]
        self.public = probe(problem.held_out[0], NODES)

    def measure(self, weights: NDArray[np.int32]) -> tuple[float, float]:
        """The held-out loss, in nats, and error, a share of labels."""
        self.adapter.load(to_float(weights))
        loss, error = (round(each(), 5) for each in self.held_out)
        return loss, error

    def answer(self, weights: NDArray[np.int32], round: int) -> Losses:
        """What an honest node answers to a public audit."""
        rows = np.arange(PUBLIC_ROWS)
        losses = self.public.row_losses(weights, [Direction(AUDIT, round)], rows, 2).mean(0)[0]
        return float(losses[0]), float(losses[1])

    def run(self, attack: str, defence: Defence, show: Callable[[str], None]) -> Row:
        """One run from the start."""
        began, rounds, rule = time.perf_counter(), self.settings.rounds, step_rule(self.manifest)
        scale = rule.start()
        replica = Replica(
            self.manifest, initial_weights(self.adapter.layout, self.key, self.manifest.adapter.train)
        )
        tallies, consensus = Influence(self.settings.sides), Consensus(tolerance(self.manifest))
        found: dict[int, int] = {}
        shares: list[float] = []
        points = [(0, *self.measure(replica.weights))]
        attackers = set() if attack == "none" else set(range(NODES - ATTACKERS, NODES))
        for number in range(rounds):
            codes_by_node: dict[int, Codes] = {}
            for node, probe in enumerate(self.probes):
                if (node in found and defence.finds) or (attack == "absent" and node in attackers):
                    continue
                if attack == "constant" and node in attackers:
                    honest = np.zeros(self.settings.directions, np.int8)  # it need not measure anything
                else:
                    honest = probe.probe(replica.weights, number, node, scale.exponent).codes
                codes_by_node[node] = ATTACKS[attack](honest) if node in attackers else honest
            nodes = tuple(sorted(codes_by_node))
            reported = np.stack([codes_by_node[node] for node in nodes])
            findings = tallies.observe(nodes, reported)
            if defence.finds and number % AUDIT_EVERY == 0:
                true = self.answer(replica.weights, number)
                lies = attackers if defence.answers == "as it reports" else ()
                answers = {node: _lie(attack, true) if node in lies else true for node in nodes}
                findings += consensus.observe(answers)
            for finding in findings:
                found.setdefault(finding.node, number)
            bits = self.settings.bits
            counted = reported if bits == 1 else capped(reported, defence.max_share)[0]
            shares.append(_share(counted, [node in attackers for node in nodes]))
            participants, codes = combined(nodes, counted.ravel(), self.manifest)
            step, scale = rule.advance(scale, number, codes)
            packed = pack(codes, bits_of_commits(self.manifest))
            replica.apply(Commit(number, (step,), (scale.exponent,), participants, packed, replica.head))
            if (number + 1) % max(1, rounds // 10) == 0 or number + 1 == rounds:
                points.append((number + 1, *self.measure(replica.weights)))
            passed = time.perf_counter() - began
            left = passed / (number + 1) * (rounds - number - 1)
            show(f"round {number + 1}/{rounds}, held-out {points[-1][1]:.3f}, {left:.0f} s left")
        return Row(
            key=self.key_of(attack, defence),
            policy=self.policy,
            attack=attack,
            defence=defence.name,
            rounds=rounds,
            points=points,
            found=found,
            shares=[round(share, 4) for share in shares],
            seconds=round(time.perf_counter() - began, 1),
            date=datetime.now(UTC).date().isoformat(),
            commit=machine.commit(),
            cpu=machine.cpu(),
        )

    def key_of(self, attack: str, defence: Defence) -> str:
        """What makes a run the same as another."""
        how = asdict(defence) if attack != "none" else {"max_share": defence.max_share}
        return key_of("poisoning", described(self.settings), ROWS, attack, how)


def _problem(num_rows: int, num_held_out: int | None) -> Problem:
    """Recipe 3 with fewer rows; all that are held out, if it is not said how many."""

    def few(rows: Sequences, num: int, stride: int = 1) -> Sequences:
        assert isinstance(rows, Labelled)
        chosen = slice(0, num * stride, stride)
        return replace(
            rows, tokens=rows.tokens[chosen], lengths=rows.lengths[chosen], labels=rows.labels[chosen]
        )

    problem = sentiment_problem(quick=False, nodes=NODES)
    return replace(
        problem,
        form=replace(problem.form, batch_size=num_rows),
        private=[few(rows, num_rows) for rows in problem.private],
        held_out=[few(problem.held_out[0], num_held_out, 2)] if num_held_out else problem.held_out,
    )


def _lie(attack: str, losses: Losses) -> Losses:
    """What a node answers whose probes give such codes by a fault: swapped signs, or a loss that stands still."""
    return (1.0, 1.0) if attack == "constant" else (losses[1], losses[0])


def _share(codes: Codes, is_attacker: Sequence[bool]) -> float:
    squares = (np.where(codes == NO_VOTE, 0, codes).astype(np.int64) ** 2).sum(1)
    return float(squares[np.asarray(is_attacker, bool)].sum() / max(int(squares.sum()), 1))


def _say(status: Status, title: str, text: str) -> None:
    status.update(f"{title}: {text}")


def load(path: Path) -> list[Row]:
    """What was run already. Raises ResultsError."""

    def row(each: dict[str, Any]) -> Row:
        each["found"] = {int(node): number for node, number in each["found"].items()}
        each["points"] = [tuple(point) for point in each["points"]]
        return Row(**each)

    return rows_of.read(path, row)


def save(path: Path, rows: Sequence[Row]) -> None:
    """Keep all rows, at once or not at all."""
    rows_of.write(path, map(asdict, rows))


def page(rows: Sequence[Row], shared: Sequence[Row], settings: Swarm, command: str) -> str:
    """The results as a page.

    Args:
        rows: of private directions.
        shared: of directions that nodes share.
        settings: of the first.
        command: that makes it.
    """
    honest = next(row for row in rows if row.attack == "none")
    begin, best = honest.points[0][1], honest.points[-1][1]
    lines = [
        "# Poisoned",
        "",
        "What four attackers among sixteen nodes do to what the swarm learns, with private directions. Made by",
        "",
        "```sh",
        command,
        "```",
        "",
        f"at the commits that the JSON names for each row, on {rows[-1].cpu}: recipe 3, a "
        f"head on a frozen MiniLM for SST-2, with {ROWS} "
        f"rows on each node, {settings.rounds} rounds of {settings.directions} two-sided directions a node, one seed. "
        f"Before it, the held-out loss is {begin:.3f}. *Learnt* is the part that is left of by how much the honest "
        "swarm lowers it; less than nothing, where it ends higher than it began.",
        "",
        "![held-out loss by round](poisoning.png)",
        "",
        "| attackers send | defence | held-out loss | error | learnt | attackers' share of a round | found, in round |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        _, end, error = row.points[-1]
        learnt = (begin - end) / (begin - best)
        who = sorted(row.found.values())
        share = f"{np.mean(row.shares):.0%}" if row.attack not in ("none", "absent") else "–"
        name = {"none": "what they should", "absent": "nothing: twelve nodes"}.get(row.attack, row.attack)
        defence = row.defence if row.attack not in ("none", "absent") else "–"
        seen = f"{len(who)}: {', '.join(map(str, who))}" if who else "–"
        lines.append(f"| {name} | {defence} | {end:.3f} | {error:.1%} | {learnt:.0%} | {share} | {seen} |")
    wrong = sum(node < NODES - ATTACKERS for row in rows for node in row.found)
    lines += [
        "",
        f"Honest nodes that were found in any of these runs: {wrong}. The loss is the figure to go by: "
        f"the error, of {HELD_OUT} rows, has a standard error of 2 points; and with one seed a tenth of what is learnt "
        "means nothing.",
        "",
        "*Inverted*: the codes of an honest node with the other sign. *Constant*: 32, the usual size, for every "
        "direction. *Maximal*: ±127 with the other sign. The attackers' share is their part of the squared length of "
        "all codes of a round, which is how far it moves the weights along their directions; four of sixteen honest "
        "nodes have 25%.",
        "",
        "What is shut out here is what the tallies of codes find (one sign, at the limit: "
        "[coordinator/influence.py](../../coordinator/influence.py)) and what public audits find "
        f"([coordinator/consensus.py](../../coordinator/consensus.py)), one every {AUDIT_EVERY} rounds. Audits find "
        "machines that are broken: they answer as they report. **Who inverts its codes on purpose and answers audits "
        "honestly is not found by anything here**, as its row shows: only the bounds hold it. With private directions "
        "nobody else can know what its codes should be; directions that several nodes share change that.",
        "",
        *_of_shared(shared),
    ]
    return "\n".join(lines)


def _of_shared(rows: Sequence[Row]) -> list[str]:
    """The section on directions that nodes share."""
    if not rows:
        return []
    lines = [
        "## Where nodes share directions",
        "",
        "The same attackers; codes for the same direction are combined, and nobody is shut out. Error is of all "
        f"{SHARED_HELD_OUT:,} held-out rows, of which the standard error is 0.9 points. To be reached: at most "
        f"{MOST_POINTS:g} points above the honest swarm.",
        "",
        "| directions | attackers send | held-out loss | error | above the honest swarm | |",
        "|---|---|--:|--:|--:|---|",
    ]
    for row in rows:
        honest = next(each for each in rows if each.policy == row.policy and each.attack == "none")
        _, loss, error = row.points[-1]
        above = round(100 * (error - honest.points[-1][2]), 1)
        if row is honest:
            lines.append(f"| {row.policy} | what they should | {loss:.3f} | {error:.1%} | – | |")
            continue
        verdict = "met" if above <= MOST_POINTS else "**not met**"
        lines.append(
            f"| {row.policy} | {row.attack} | {loss:.3f} | {error:.1%} | {above:+.1f} points | {verdict} |"
        )
    return [*lines, ""]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Held-out loss by round, a panel for each attack; what rises far above the start leaves its panel."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    attacks = [attack for attack in ATTACKS if attack not in ("none", "absent")]
    figure, panels = plt.subplots(
        1, len(attacks), figsize=(4.4 * len(attacks), 4), sharey=True, layout="constrained"
    )
    start, lowest = rows[0].points[0][1], min(point[1] for row in rows for point in row.points)
    top = start + (start - lowest)
    for panel, attack in zip(panels, attacks, strict=True):
        panel.set_ylim(lowest - 0.1 * (start - lowest), top)
        for row in rows:
            if row.attack in ("none", "absent", attack):
                label = {"none": "no attackers", "absent": "twelve nodes"}.get(row.attack, row.defence)
                style = "--" if row.attack in ("none", "absent") else "-"
                numbers, losses, _ = zip(*row.points, strict=True)
                (line,) = panel.plot(numbers, losses, linestyle=style, marker=".", label=label)
                if losses[-1] > top:
                    where = {"xy": (1, 0.98), "xycoords": "axes fraction", "ha": "right", "va": "top"}
                    panel.annotate(f"up to {max(losses):.1f} ", **where, color=line.get_color())
        panel.set_title(f"{attack} codes")
        panel.set_xlabel("round")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss, nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was not run yet, and write the page."""
    parser = command_line("poisoning", __doc__)
    add_out(parser, "rows, page and plot", Path("poisoning-out"))
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it works")
    given = parser.parse_args(arguments)
    settings = Swarm(rounds=10 if given.quick else 300, directions=4, sides=2, step=0.3, epsilon=0.01)
    path = given.out / ("poisoning-quick.json" if given.quick else "poisoning.json")
    err = Console(stderr=True)
    try:
        known = {row.key: row for row in load(path)}
    except rows_of.ResultsError as error:
        parser.exit(Exit.INPUT, f"benchmarks.poisoning: {error}\n")
    num_rows = 8 if given.quick else ROWS

    def ran(arena: Arena, runs: Sequence[tuple[str, Defence]]) -> list[Row]:
        keys = [arena.key_of(attack, defence) for attack, defence in runs]
        for (attack, defence), key in zip(runs, keys, strict=True):
            title = f"{arena.policy}: {attack}, {defence.name}"
            if key not in known:
                with err.status(title) as status:
                    known[key] = arena.run(attack, defence, partial(_say, status, title))
                save(path, list(known.values()))
            err.print(f"{title}: {known[key].points[-1][1]:.3f}, {known[key].seconds:.0f} s", highlight=False)
        return [known[key] for key in dict.fromkeys(keys)]

    rows = ran(Arena(_problem(num_rows, 64 if given.quick else HELD_OUT), settings), RUNS)
    problem = _problem(num_rows, 64 if given.quick else None)
    shared: list[Row] = []
    for name, (policy, bits) in POLICIES.items():
        # A sixteenth of the directions, or a quarter: the same step would move the weights four times as far, or twice.
        step = settings.step / (NODES / policy.groups) ** 0.5
        how = replace(settings, policy=policy, bits=bits, step=step)
        shared += ran(Arena(problem, how, name), [(attack, CAPPED) for attack in SHARED_ATTACKS])
    save(path, [*rows, *shared])
    plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(
        page(rows, shared, settings, machine.command("benchmarks.poisoning")), "utf-8"
    )
    err.print(f"wrote {path.with_suffix('.md')}", highlight=False)


if __name__ == "__main__":
    main()
