"""A privacy budget: spent before anything is said, remembered over any end, and never exceeded."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import budget as budgets
from node.accountant import Cost, epsilon, num_affordable
from node.budget import Account, Guard, PrivateTrainer, plan
from node.privacy import Budget
from node.records import DataError
from node.service import BudgetSpentError, NodeError, Trainer
from node.state import StateError
from transport.exits import Exit
from zo.weights import zeros

WEIGHTS = zeros(500)
BUDGET = Budget(epsilon=3.0, delta=1e-5, clip=0.5)
NOISY = Budget(epsilon=3.0, delta=1e-5, clip=0.5, noise=1.5)


class Killed(BaseException):
    """The process ends here."""


class Probed:
    def __init__(self, codes):
        self.codes, self.loss, self.num_no_votes = codes, 1.0, 0


class Measuring:
    """A trainer that makes so many releases in a probe, and says something else each time."""

    def __init__(self, mechanism, releases):
        self.mechanism, self.releases, self.probes = mechanism, releases, 0

    def probe(self, weights, round, node, exponent, agent=0, walk_step=0, importances=None):
        self.probes += 1
        for _ in range(self.releases):
            self.mechanism.noisy_sum(np.zeros((3, 1)))
        return Probed(np.random.default_rng(self.probes).integers(-9, 9, 16).astype(np.int8))


class Node:
    """A node that may end at any time, and begins again from its file."""

    def __init__(self, path, manifest, budget=NOISY, **options):
        self.path, self.manifest, self.budget, self.told = path, manifest, budget, []
        self.options = {"num_rows": 80, "num_agents": 1, "quantize": "none"} | options
        self.begin()

    def begin(self):
        self.guard = Guard(
            self.budget,
            plan(self.budget, self.manifest, **self.options),
            Account(self.path, 1 + self.manifest.run.pipeline),
        )
        self.measuring = Measuring(self.guard.mechanism, self.guard.plan.releases_per_probe)
        self.trainer = PrivateTrainer(self.measuring, self.guard, self.told.append)
        return self

    def codes(self, round, *, weights=WEIGHTS, exponent=-4, agent=0, walk_step=0, importances=None):
        return self.trainer.probe(weights, round, 0, exponent, agent, walk_step, importances).codes.tolist()

    @property
    def releases(self):
        """As the file has it."""
        return sum(each["releases"] for each in json.loads(self.path.read_bytes())["spent"])


@pytest.fixture
def node(tmp_path, make_manifest):
    return Node(tmp_path / "privacy.json", make_manifest(rounds=100))


def test_what_is_spent_is_on_disk_before_codes_are_seen(node):
    assert node.codes(0)
    assert node.releases == 2, "one for each direction"
    node.codes(1)
    assert node.releases == 4


def test_a_round_asked_for_again_has_the_same_codes_and_costs_nothing(node):
    said = node.codes(0)
    assert node.codes(0) == said
    assert node.begin().codes(0) == said, "after a kill -9, too"
    assert node.releases == 2
    assert node.measuring.probes == 0
    assert not node.begin().trainer.probe(WEIGHTS, 0, 0, -4).num_no_votes


def test_the_step_of_a_walk_that_a_restart_forgot_is_not_another_question(node):
    said = node.codes(0, walk_step=7)
    assert node.begin().codes(0, walk_step=3) == said
    assert node.releases == 2


def test_in_a_pipelined_run_both_rounds_that_are_not_settled_are_answered_as_before(tmp_path, make_manifest):
    node = Node(tmp_path / "privacy.json", make_manifest(rounds=100, pipeline=1))
    said = [node.codes(round) for round in range(3)]
    assert [node.begin().codes(round) for round in (1, 2)] == said[1:]
    assert node.releases == 6
    node.codes(0)
    assert node.releases == 8, "of the one before them nothing is kept: it is measured anew, and paid for"


@pytest.mark.parametrize(
    "other",
    [
        {"weights": zeros(500) + 1},
        {"exponent": -5},
        {"agent": 1},
        {"importances": zeros(4)},
    ],
    ids=str,
)
def test_another_question_about_a_round_is_another_release(node, other):
    """Weights of round 0 that are others: a coordinator may say so, or have lost its ledger."""
    first = node.codes(0)
    assert node.codes(0, **other) != first
    assert node.releases == 4


def test_killed_before_the_file_is_written_nothing_was_said_and_nothing_is_spent(node, monkeypatch):
    node.codes(0)

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(budgets, "write_atomically", kill)
        with pytest.raises(Killed):
            node.codes(1)
    assert node.begin().releases == 2
    assert node.codes(1)
    assert node.releases == 4


def test_what_cannot_be_written_is_not_said(node, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(budgets, "write_atomically", full)
    with pytest.raises(StateError, match=r"cannot write .*privacy.json: No space left on device"):
        node.codes(0)


def test_a_node_stops_at_its_budget_and_not_a_release_before(node):
    wanted = node.guard.plan
    most = num_affordable({}, wanted.cost, 3.0, 1e-5) // wanted.releases_per_probe
    assert 3 < most < 100
    for round in range(most):
        node.codes(round)
    for again in (node, node.begin()):
        with pytest.raises(
            BudgetSpentError, match=r"the privacy budget is spent: epsilon is 2\.9"
        ) as stopped:
            again.codes(most)
        assert stopped.value.code is Exit.BUDGET
        assert again.measuring.probes in (most, 0), "nothing is measured that may not be said"
    assert node.codes(most - 1), "what was said may be said again"
    assert node.releases == 2 * most
    assert epsilon(node.guard.account.spent, 1e-5) <= 3.0
    assert node.told[-1].epsilon == pytest.approx(node.guard.epsilon)
    node.budget = Budget(epsilon=4.0, delta=1e-5, clip=0.5, noise=1.5)
    assert node.begin().codes(most), "a larger budget has room again"


@given(
    st.lists(st.tuples(st.sampled_from(["ask", "again", "kill", "change"]), st.integers(0, 3)), max_size=12)
)
def test_whatever_happens_no_codes_are_seen_that_are_not_paid_for(tmp_path_factory, make_manifest, events):
    node = Node(tmp_path_factory.mktemp("node") / "privacy.json", make_manifest(rounds=50))
    seen, round = set(), 0
    for event, number in events:
        if event == "kill":
            node.begin()
        elif event == "change":
            node.budget = Budget(epsilon=3.0, delta=1e-5, clip=0.5, noise=0.6 + 0.2 * number)
            node.begin()
        else:
            round += event == "ask"
            try:
                seen.add(tuple(node.codes(round, agent=number % 2)))
            except BudgetSpentError:
                assert node.guard.epsilon_after > 3.0
    if seen:
        assert node.releases >= 2 * len(seen)
        assert node.begin().guard.epsilon <= 3.0


def test_a_private_trainer_does_all_that_a_trainer_does(node):
    asked = {name for name in vars(Trainer) if not name.startswith("_")}
    assert asked <= set(dir(PrivateTrainer))
    node.measuring.audit = lambda weights, sample, agent: (1.0, 2.0)
    assert node.trainer.audit(WEIGHTS, 3) == (1.0, 2.0)
    assert not node.path.exists(), "public rows cost nothing"


def test_a_measurement_past_the_mechanism_is_never_said(node):
    node.measuring.releases = 1
    with pytest.raises(AssertionError, match="a probe made 1 releases, and 2 are accounted for"):
        node.codes(0)
    assert not node.path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}x",
        b'{"spent": 3}',
        b'{"spent": [{"rate": 2.0, "noise": 1.0, "releases": 3}]}',
        b'{"more": 1}',
    ],
)
def test_a_damaged_account_is_never_begun_anew(node, content):
    node.codes(0)
    node.path.write_bytes(content)
    with pytest.raises(
        NodeError, match="says how much of the privacy budget is spent, and cannot be read"
    ) as failed:
        node.begin()
    assert failed.value.code is Exit.DAMAGED
    assert node.path.read_bytes() == content


def test_releases_of_a_round(make_manifest):
    """Two-sided a batch and a release for each direction; one-sided one for those that share a batch."""

    def releases(**fields):
        return plan(NOISY, make_manifest(**fields), 80, 1, "none").releases_per_probe

    assert releases(directions=6) == 6
    assert releases(directions=6, local_steps=3) == 6
    assert releases(directions=6, sides=1) == 1
    assert releases(directions=6, sides=1, local_steps=3) == 3


def test_the_budget_is_for_all_rounds_and_agents(make_manifest):
    wanted = plan(BUDGET, make_manifest(rounds=20, directions=2, count=3), 80, 3, "none")
    assert (wanted.num_probes, wanted.num_releases) == (60, 120)
    assert epsilon({wanted.cost: 120}, 1e-5) <= 3.0 < epsilon({wanted.cost: 121}, 1e-5)


def test_a_batch_holds_a_row_as_often_as_is_accounted(make_manifest):
    assert plan(NOISY, make_manifest(batch_size=8), 80, 1, "none").cost == Cost(0.1, 1.5)
    assert plan(NOISY, make_manifest(batch_size=8), 5, 1, "none").cost == Cost(1.0, 1.5)


def test_what_a_budget_means_is_said(node):
    said = str(node.guard)
    assert "each window is in a batch with probability 0.1, says at most 0.5 and meets noise of 0.75" in said
    most = num_affordable({}, node.guard.plan.cost, 3.0, 1e-5) // 2
    assert (
        f"epsilon is 0 of 3 at delta = 1e-05, which lasts for {most} of 100 probes; no loss is sent" in said
    )
    node.options["num_rows"], node.budget = 5, BUDGET
    assert "each window is in every batch" in str(node.begin().guard)
    assert "which lasts for all 100 of 100 probes" in str(node.guard)


def test_what_is_protected_is_a_row_where_there_are_rows(make_manifest):
    manifest = make_manifest(kind="head", labels=("0", "1"))
    assert plan(NOISY, manifest, 80, 1, "none").unit == "row"


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"kind": "completion", "objective": "callable", "score": "a:b"},
            {},
            "a callable may judge a text by others beside it",
        ),
        ({}, {"quantize": "int8"}, "with int8 the rows of a forward pass change each other's losses"),
        ({}, {"num_rows": 200_000}, "--dp-delta 1e-05 allows one of 200,000 rows to be told outright"),
    ],
)
def test_what_cannot_be_private_is_refused(make_manifest, fields, options, message):
    with pytest.raises(DataError, match=message):
        plan(
            NOISY,
            make_manifest(**fields),
            **({"num_rows": 80, "num_agents": 1, "quantize": "none"} | options),
        )


def test_a_budget_that_no_noise_keeps_is_refused(make_manifest):
    with pytest.raises(
        DataError, match=r"--dp-epsilon 1e-09: .* needs more than 1048576 times as much noise"
    ):
        plan(Budget(epsilon=1e-9, delta=1e-30, clip=1.0), make_manifest(rounds=10**6), 80, 1, "none")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "--dp-epsilon takes a number above 0, got 0"),
        ({"epsilon": float("nan")}, "--dp-epsilon takes a number above 0, got nan"),
        ({"delta": 1.0}, "--dp-delta takes a number between 0 and 1, got 1"),
        ({"clip": -1.0}, "--dp-clip takes a number above 0, got -1"),
        ({"noise": 0.0}, "--dp-noise takes a number above 0 and up to 1048576, got 0"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(DataError, match=message):
        Budget(**({"epsilon": 1.0, "delta": 1e-5, "clip": 1.0} | wrong))
