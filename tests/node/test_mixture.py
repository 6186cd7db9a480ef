"""Several agents as one model: what they predict together is what plain PEFT gives one by one, mixed by hand."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from node import cli, embedded
from node.adapter import Adapter
from node.base import BaseError, load_base
from node.completions import prompt_ids
from node.data import Batch, LabelledBatch
from node.generation import complete
from node.language import adapt
from node.losses import label_logits, mean_loss
from node.mixture import Mixture, _counted, asked_together
from node.state import StateDirectory
from node.tasks import adapters_in
from zo.manifest import parse_manifest
from zo.replica import Replica
from zo.weights import from_float

NUM_AGENTS = 3
TARGETS = ("q_proj", "v_proj", "up_proj")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters that change the base much, and differently."""
    root = tmp_path_factory.mktemp("export")
    adapter = Adapter(
        load_base(embedded.path(), threads=1), key=(1, 2), targets=TARGETS, rank=2, alpha=8, train="B"
    )
    for agent in range(NUM_AGENTS):
        values = np.random.default_rng(agent).normal(0, 0.5, adapter.size)
        adapter.export(root / f"agent-{agent}", from_float(values), str(embedded.path()))
    return adapters_in([root])


@pytest.fixture(scope="module")
def tokens():
    base = load_base(embedded.path(), threads=1)
    ids = base.tokenizer("Return the number of items in a container.", return_tensors="np")["input_ids"]
    return np.repeat(ids, 2, 0).astype(np.int64)


@pytest.fixture(scope="module")
def by_hand(folders, tokens):
    """(agents, rows, tokens, vocabulary): what each adapter says alone, loaded with plain PEFT on a base of its own."""
    each = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(embedded.path())
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        with torch.inference_mode():
            each.append(model(input_ids=torch.from_numpy(tokens)).logits.double().softmax(-1))
    return torch.stack(each)


def mixture(folders, mix="mean"):
    return Mixture(load_base(embedded.path(), threads=1).model, folders, mix)


def predicted(model, tokens):
    with torch.inference_mode():
        return asked_together(model, lambda each, _: each(input_ids=torch.from_numpy(tokens)).logits)


def test_the_adapters_differ(by_hand):
    choices = by_hand.argmax(-1)
    assert (choices[0] != choices[1]).any()
    assert (choices[1] != choices[2]).any()


def test_the_mean_is_that_of_the_probabilities(folders, tokens, by_hand):
    mixed = predicted(mixture(folders), tokens).double()
    assert torch.allclose(mixed.exp(), by_hand.mean(0), atol=1e-6)
    assert torch.allclose(mixed.logsumexp(-1), torch.zeros(1, dtype=torch.float64), atol=1e-5)
    order = predicted(mixture([folders[2], folders[0], folders[1]]), tokens).double()
    assert torch.allclose(mixed, order, atol=1e-4)


def test_the_loss_of_the_mean_is_that_of_its_probabilities(folders, tokens, by_hand):
    true = torch.from_numpy(tokens[:, 1:]).unsqueeze(-1)
    expected = -by_hand.mean(0)[:, :-1].gather(-1, true).log().mean()
    assert mean_loss(mixture(folders), Batch(tokens, None)) == pytest.approx(float(expected), rel=1e-5)
    # By Jensen's inequality it is no more than the mean of their losses.
    alone = -by_hand[:, :, :-1].log().gather(-1, true.expand(NUM_AGENTS, *true.shape)).mean()
    assert expected < alone


def test_the_vote_is_the_most_frequent_choice(folders, tokens, by_hand):
    mixed = predicted(mixture(folders, "vote"), tokens).argmax(-1)
    choices = by_hand.argmax(-1).numpy()
    for row in range(choices.shape[1]):
        for position in range(choices.shape[2]):
            votes = choices[:, row, position].tolist()
            most = max(map(votes.count, votes))
            expected = next(
                each for each in votes if votes.count(each) == most
            )  # of equals, the earliest agent's
            assert int(mixed[row, position]) == expected


def test_words_that_stand_for_labels_are_chosen_among_before_they_are_mixed(folders, tokens, by_hand):
    words = np.array([5, 70, 300])
    lengths = np.array([4, tokens.shape[1]])
    batch = LabelledBatch(tokens, lengths, np.array([0, 2]), 0, words)
    of_words = by_hand[:, [0, 1], lengths - 1][:, :, words]
    each = of_words / of_words.sum(-1, keepdim=True)
    mixed = label_logits(mixture(folders), batch).double().exp()
    assert torch.allclose(mixed, each.mean(0), atol=1e-6)
    choices = each.argmax(-1).T.tolist()
    voted = label_logits(mixture(folders, "vote"), batch).argmax(-1).tolist()
    assert voted == [max(row, key=lambda label: (row.count(label), -row.index(label))) for row in choices]


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([4], 4),
        ([2, 1], 2),
        ([1, 2], 1),
        ([3, 1, 1], 1),
        ([3, 1, 1, 3], 3),
        ([0, 1, 1, 0, 2], 0),
        ([2, 0, 1], 2),
    ],
)
def test_of_equal_votes_that_of_the_earliest_counts(votes, winner):
    shares = _counted(torch.tensor(votes), 5)
    assert int(shares.argmax()) == winner
    expected = np.bincount(votes, minlength=5) / len(votes)
    assert np.allclose(shares.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mix", ["mean", "vote"])
def test_generation_goes_on_from_what_they_said_together(folders, mix):
    base = load_base(embedded.path(), threads=1)
    model = Mixture(base.model, folders, mix)
    ids = prompt_ids(base.tokenizer, "Return the")
    start = len(ids)
    for _ in range(8):  # without any memory of what was computed before
        ids.append(int(predicted(model, np.array([ids]))[0, -1].argmax()))
    assert complete(base, model, "Return the", 8) == base.tokenizer.decode(
        ids[start:], skip_special_tokens=True
    )


def test_generation_ends_where_the_text_ends(folders, monkeypatch):
    base = load_base(embedded.path(), threads=1)
    model = Mixture(base.model, folders, "mean")
    ids = prompt_ids(base.tokenizer, "Return the")
    first = int(predicted(model, np.array([ids]))[0, -1].argmax())
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", [first])
    assert complete(base, model, "Return the", 20) == ""


def test_an_export_stands_for_its_agents_in_their_order(folders, tmp_path):
    assert [folder.name for folder in folders] == ["agent-0", "agent-1", "agent-2"]
    for number in (2, 10, 1):
        (tmp_path / f"agent-{number}").mkdir()
        (tmp_path / f"agent-{number}" / "adapter_config.json").write_text("{}")
    found = adapters_in([folders[1], tmp_path])
    assert [folder.name for folder in found] == ["agent-1", "agent-1", "agent-2", "agent-10"]
    with pytest.raises(BaseError, match="is not a PEFT adapter"):
        adapters_in([tmp_path / "agent-1" / "nothing"])


# ---- commands -------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("Return the number of items in a container. " * 20)
    return path


def test_evaluate_takes_several_adapters_or_their_export(folders, text_file):
    options = ("--data", text_file, "--threads", 1, "--sequence-length", 32, "--json")
    repeated = [option for folder in folders for option in ("--adapter", folder)]
    together = json.loads(succeeds("evaluate", *options, *repeated, "--mix", "mean"))
    assert json.loads(succeeds("evaluate", *options, "--adapter", folders[0].parent)) == together
    alone = [json.loads(succeeds("evaluate", *options, "--adapter", folder))["loss"] for folder in folders]
    assert together["loss"] < np.mean(alone)
    voted = run("evaluate", *options, *repeated, "--mix", "vote")
    assert voted.exit_code == 3
    assert "a vote has no loss" in voted.stderr


def test_predict_takes_several_adapters(folders):
    for mix in ("mean", "vote"):
        said = succeeds(
            "predict", "Return the", "--adapter", folders[0].parent, "--mix", mix, "--max-tokens", 4
        )
        base = load_base(embedded.path(), threads=1)
        assert said == complete(base, Mixture(base.model, folders, mix), "Return the", 4) + "\n"


def test_a_mix_of_one_is_an_error(folders):
    result = run("predict", "Return the", "--adapter", folders[0], "--mix", "vote")
    assert result.exit_code == 3
    assert "--mix vote takes several adapters, got 1" in result.stderr


@pytest.fixture
def state(tmp_path, manifest):
    """A node that holds two of three agents."""
    directory = StateDirectory(tmp_path / "state")
    with directory.lock():
        directory.save_manifest(manifest)
        for agent in (0, 2):
            weights = (
                np.random.default_rng(agent).integers(-(2**26), 2**26, manifest.adapter.size).astype(np.int32)
            )
            directory.agent(agent).save(Replica(manifest, weights, 5, bytes(16), agent), manifest)
    return directory


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """The manifest that `init` makes for the embedded base, with three agents."""
    from coordinator.cli import app

    path = tmp_path_factory.mktemp("run") / "run"
    made = CliRunner().invoke(
        app, ["init", str(path), "--model", str(embedded.path()), "--agents", "3", "--assignment", "by-node"]
    )
    assert made.exit_code == 0, made.output
    return parse_manifest((path / "manifest.toml").read_text("utf-8"))


def test_export_writes_every_agent_that_is_there_or_one(state, tmp_path, manifest):
    said = succeeds("export", state.path, "-o", tmp_path / "all")
    assert [line.partition(",")[0] for line in said.splitlines()[:2]] == ["agent 0", "agent 2"]
    assert [folder.name for folder in adapters_in([tmp_path / "all"])] == ["agent-0", "agent-2"]
    succeeds("export", state.path, "-o", tmp_path / "one", "--agent", 2)
    one, other = (tmp_path / "one" / "adapter_model.safetensors", tmp_path / "all" / "agent-2")
    assert one.read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    missing = run("export", state.path, "-o", tmp_path / "no", "--agent", 1)
    assert missing.exit_code == 3
    assert "holds no weights of agent 1 yet" in missing.stderr
    merged = run("export", state.path, "-o", tmp_path / "no", "--merge")
    assert merged.exit_code == 3
    assert "--merge makes one model of one agent" in merged.stderr
    succeeds("export", state.path, "-o", tmp_path / "merged", "--merge", "--agent", 0)


def test_an_exported_agent_is_its_weights(state, tmp_path, manifest, tokens):
    succeeds("export", state.path, "-o", tmp_path / "all")
    base = load_base(embedded.path(), threads=1)
    adapter = adapt(base, manifest)
    _, replica = state.agent(2).load(manifest.run_id)
    adapter.load((replica.weights * 2.0**-28).astype(np.float32))
    plain = AutoModelForCausalLM.from_pretrained(embedded.path())
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "all" / "agent-2")).eval()
    assert torch.allclose(predicted(adapter.model, tokens), predicted(plain, tokens), atol=1e-4)
