"""The commands themselves, with the embedded language model: two nodes train, and the adapter works in plain PEFT."""

import json
import shutil

import numpy as np
import pytest

from node import embedded
from node.state import load_result

pytestmark = pytest.mark.e2e
PROBE = ("--rounds", 4, "--directions", 1, "--batch-size", 1, "--sequence-length", 16, "--quorum", 2)


@pytest.fixture
def language_swarm(swarm, tmp_path):
    swarm.base = embedded.path()
    swarm.init(*PROBE)
    (tmp_path / "data.txt").write_text("Return the absolute value of the number. " * 20)
    return swarm


def join(swarm, name, data, *options):
    arguments = ("join", swarm.ticket, "--data", data, "--name", name, "--state", swarm.state(name))
    swarm.nodes[name] = swarm.start(name, "-m", "node.cli", *arguments, "--threads", 1, *options)
    return swarm.nodes[name]


def test_two_nodes_train_and_the_adapter_measures_the_same_in_plain_peft(language_swarm, tmp_path):
    swarm = language_swarm
    swarm.serve()
    data = tmp_path / "data.txt"
    join(swarm, "ada", data, "--eval", data, "--eval-every", 2)
    join(swarm, "ben", data)
    proof = swarm.assert_finished("ada", "ben")
    assert "all 4 rounds are done" in swarm.nodes["ada"].err
    assert [r["round"] for r in swarm.log("ada") if "held_out" in r] == [0, 2]
    (rehearsal,) = [r["rehearsal"] for r in swarm.log("ada") if "rehearsal" in r]
    assert rehearsal["signal"] > rehearsal["unevenness"] > 0
    assert "probing: " in swarm.nodes["ada"].err
    adapter = tmp_path / "adapter"
    exported = swarm.command("node.cli", "export", swarm.run, "-o", adapter)
    assert exported.wait() == 0, exported
    assert proof.digest in exported.out

    window = ("--sequence-length", 16, "--threads", 1)
    options = ("--data", data, "--adapter", adapter, "--json", *window)
    measured = swarm.command("node.cli", "evaluate", *options)
    assert measured.wait() == 0, measured

    from peft import PeftModel

    from node.base import load_base
    from node.data import read_windows
    from node.losses import mean_loss_over

    base = load_base(embedded.path(), threads=1)
    windows = read_windows([data], base.tokenizer, 16)
    before = mean_loss_over(base.model, windows, batch_size=8)
    loss = mean_loss_over(PeftModel.from_pretrained(base.model, str(adapter)).eval(), windows, batch_size=8)
    assert json.loads(measured.out)["loss"] == loss
    assert abs(loss - before) > 1e-6, "the adapter does something"
    # A second export into the same place loses nothing.
    again = swarm.command("node.cli", "export", swarm.state("ben"), "-o", adapter)
    assert again.wait() == 3
    assert "exists already; choose another directory" in again.err
    assert load_result(swarm.state("ben"))[1].digest().hex() == proof.digest


def test_a_private_node_leaves_when_its_budget_is_spent_and_stays_away(swarm, says, tmp_path):
    swarm.base = embedded.path()
    swarm.init(*PROBE, "--quorum", 1, "--batch-size", 64)
    swarm.serve()
    (tmp_path / "data.txt").write_text("Return the absolute value of the number. " * 20)
    private = ("--dp-epsilon", 8, "--dp-clip", 0.01, "--dp-noise", 1.2)
    join(swarm, "ada", tmp_path / "data.txt", "--show-wire", *private)
    says(swarm.nodes["ada"], 15, "the privacy budget is spent: epsilon is 7.* at delta = 1e-05, and round 3")
    assert swarm.nodes["ada"].out.count("Report") == 3
    spent = [record["epsilon"] for record in swarm.log("ada") if "epsilon" in record]
    assert len(spent) == 3
    assert 0 < spent[0] < spent[1] < spent[2] <= 8
    join(swarm, "ada", tmp_path / "data.txt", *private)
    says(swarm.nodes["ada"], 15, "the privacy budget is spent")
    says(join(swarm, "ada", tmp_path / "data.txt"), 3, "what this node reported was differentially private")


def test_prompts_and_completions_on_a_base_in_four_bits(swarm, says, tmp_path):
    swarm.base = embedded.path()
    swarm.init(*PROBE, "--quantize", "nf4", "--task", "completion")
    swarm.serve()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Return the", "completion": " absolute value."}\n' * 3)
    (tmp_path / "data.txt").write_text("Return the absolute value of the number. " * 20)
    join(swarm, "cho", rows, "--quantize", "int8")
    join(swarm, "dia", tmp_path / "data.txt")
    join(swarm, "ada", rows)
    says(swarm.nodes["cho"], 3, "all nodes of this run hold the base quantised as nf4")
    says(swarm.nodes["dia"], 3, "rows of prompt and completion are expected")
    join(swarm, "ben", rows)
    swarm.assert_finished("ada", "ben")
    assert "training data: 3 rows, " in swarm.nodes["ada"].err

    model = tmp_path / "model"
    merged = swarm.command("node.cli", "export", swarm.run, "-o", model, "--merge")
    assert merged.wait() == 0, merged
    assert f"AutoModelForCausalLM.from_pretrained({str(model)!r})" in merged.out
    assert (model / "model.safetensors").stat().st_size > 0


def test_data_that_cannot_be_used_is_said_with_its_line(language_swarm, says, tmp_path):
    language_swarm.serve()
    wrong = {
        "field.jsonl": (
            '{"text": "fine"}\n\n{"txt": "not fine"}\n',
            "field.jsonl, line 3: no field .text.",
        ),
        "rows.jsonl": ('{"text": "fine"}\nnot JSON\n', "rows.jsonl, line 2: "),
        "short.txt": ("Hi", "do not fill one window of 16; give this node more text"),
    }
    for name, (content, _) in wrong.items():
        (tmp_path / name).write_text(content)
        join(language_swarm, name.partition(".")[0], tmp_path / name)
    for name, (_, words) in wrong.items():
        says(language_swarm.nodes[name.partition(".")[0]], 3, words)
    assert language_swarm.coordinator.is_running


def test_another_base_than_the_runs_is_refused_before_it_is_loaded(language_swarm, says, tmp_path):
    language_swarm.serve()
    shutil.copytree(embedded.path(), tmp_path / "model")
    with (tmp_path / "model" / "config.json").open("a") as file:
        file.write("\n")
    model = ("--model", tmp_path / "model")
    says(join(language_swarm, "ada", tmp_path / "data.txt", *model), 5, "the run's base 'embedded' has")
    assert language_swarm.status().members == []


def test_an_encoder_learns_labels_through_a_head(swarm, encoder, says, tmp_path):
    swarm.base = encoder
    labels = ("--task", "head", "--label", "0", "--label", "1", "--target", "query")
    swarm.init(*PROBE, *labels)
    swarm.serve()
    rows, other = tmp_path / "rows.tsv", tmp_path / "other.tsv"
    rows.write_text("Return the value\t1\nIf the list is empty\t0\n")
    other.write_text("text\tlabel\nReturn\t2\n")
    columns = ("--column", "text=1", "--column", "label=2", "--model", encoder)
    wrong = join(swarm, "cho", other, "--model", encoder)
    join(swarm, "ada", rows, "--eval", rows, "--eval-every", 2, *columns)
    says(wrong, 3, "line 2: the label '2' is none of this run's, which are '0', '1'")
    join(swarm, "ben", rows, *columns)
    proof = swarm.assert_finished("ada", "ben")
    assert "training data: 2 rows (1 0, 1 1), " in swarm.nodes["ada"].err
    adapter = tmp_path / "adapter"
    exported = swarm.command("node.cli", "export", swarm.state("ada"), "-o", adapter, "--model", encoder)
    assert exported.wait() == 0, exported
    assert proof.digest in exported.out
    measured = swarm.command(
        "node.cli", "evaluate", "--data", rows, "--adapter", adapter, "--json", *columns, "--threads", 1
    )
    assert measured.wait() == 0, measured
    assert json.loads(measured.out)["accuracy"] in (0.0, 0.5, 1.0)


def test_a_function_of_the_nodes_own_judges_what_the_model_writes(swarm, says, tmp_path):
    swarm.base = embedded.path()
    wanted = (
        "--task",
        "completion",
        "--objective",
        "callable",
        "--score",
        "judge:score",
        "--max-new-tokens",
        3,
    )
    swarm.init(*PROBE, *wanted)
    swarm.serve()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Return the", "completion": " absolute value."}\n' * 3)
    nameless = join(swarm, "cho", rows)
    wrong = join(swarm, "dia", rows, "--score", "tests.e2e.judge:broken")
    join(swarm, "ada", rows, "--score", "tests.e2e.judge:score")
    says(nameless, 3, "every node has of its own, 'judge:score': name yours with --score")
    says(wrong, 3, "the score must be a number, got None for the prompt 'Return the' and the completion ")
    join(swarm, "ben", rows, "--score", "tests.e2e.judge:score")
    swarm.assert_finished("ada", "ben")


def test_a_run_starts_from_an_adapter_that_every_node_must_have(swarm, says, tmp_path):
    from node.adapter import Adapter
    from node.base import load_base

    base = load_base(embedded.path(), threads=1)
    made = Adapter(base, key=(1, 2), targets=("q_proj",), rank=2, alpha=4, train="AB")
    weights = np.random.default_rng(0).integers(-(2**24), 2**24, made.size).astype(np.int32)
    adapter, data = tmp_path / "adapter", tmp_path / "data.txt"
    made.export(adapter, weights, "the base")
    data.write_text("Return the absolute value of the number. " * 20)

    swarm.base = embedded.path()
    swarm.init(*PROBE, "--quorum", 1, "--train", "AB", "--adapter", adapter)
    swarm.serve()
    says(
        join(swarm, "cho", data),
        5,
        "the run starts from a PEFT adapter, of digest .*; name its directory with",
    )
    join(swarm, "ada", data, "--adapter", adapter)
    swarm.assert_finished("ada")
    trained = load_result(swarm.run)[1].weights
    assert (trained != weights).any()
    assert np.corrcoef(trained, weights)[0, 1] > 0.8, "it went on from there"
