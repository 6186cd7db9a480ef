"""Exports: a pool file and the base become the adapter; what goes wrong is said and leaves nothing."""

import numpy as np
import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from coordinator.cli import app as coordinator_app
from coordinator.rundir import RunDirectory
from node import embedded
from node.cli import app as node_app
from transport.exits import Exit
from zo.commit import Commit, genesis
from zo.poolfile import decode_pool_file


def run(app, *arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=120)


def make(path, *options):
    """A run of three rounds on the embedded base."""
    made = run(coordinator_app, "init", path, "--model", embedded.path(), "--directions", 4, *options)
    assert made.exit_code == 0, made.output
    directory = RunDirectory(path)
    manifest, signer = directory.manifest(), directory.signer(directory.manifest())
    replica, rng = directory.initial(manifest), np.random.default_rng(0)
    with directory.ledger(manifest) as ledger:
        for number in range(3):
            codes = rng.integers(-90, 90, 8).astype(np.int8).tobytes()
            commit = Commit(number, (2**20,), (-4,), (0, 1), codes, replica.head)
            replica.apply(commit)
            seal = signer.seal(genesis(manifest.run_id, 0), replica.round, replica.head)
            ledger.append(commit, seal=seal)
    return replica


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pool file and the replica that it is of."""
    folder = tmp_path_factory.mktemp("pool")
    replica = make(folder / "run", "--policy", "pool")
    file = folder / "out.zo"
    result = run(coordinator_app, "export", folder / "run", "--pool", file)
    assert result.exit_code == 0, result.output
    assert f"digest {replica.digest().hex()}" in result.output
    again = run(coordinator_app, "export", folder / "run", "--pool", file)
    assert again.exit_code == Exit.INPUT
    assert "exists already" in again.output
    return file, replica


def test_the_base_and_the_file_give_the_adapter_with_the_runs_digest(exported, tmp_path):
    file, replica = exported
    assert file.stat().st_size < 18_000 < replica.weights.nbytes
    made = run(node_app, "export", "--from", file, "-o", tmp_path / "rebuilt")
    assert made.exit_code == 0, made.output
    assert f"round 3, digest {replica.digest().hex()}" in made.output
    assert run(coordinator_app, "export", file.parent / "run", "-o", tmp_path / "state").exit_code == 0
    usual = run(node_app, "export", tmp_path / "state", "-o", tmp_path / "usual")
    assert usual.exit_code == 0, usual.output
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("rebuilt", "usual"))
    assert one.read_bytes() == other.read_bytes()


def test_a_file_cut_off_or_of_another_base_is_refused(exported, tmp_path, encoder):
    file, _ = exported
    cut = tmp_path / "cut.zo"
    cut.write_bytes(file.read_bytes()[:-100])
    for arguments, code, words in [
        (("--from", cut), Exit.INPUT, "the pool file is cut off or damaged"),
        (("--from", tmp_path / "none.zo"), Exit.INPUT, "cannot read"),
        (
            ("--from", file, "--model", encoder),
            Exit.BASE,
            decode_pool_file(file.read_bytes()).manifest.base.digest,
        ),
        (
            (file.parent / "run", "--from", file),
            Exit.INPUT,
            "name a run's directory, or a pool file with --from FILE",
        ),
        ((), Exit.INPUT, "name a run's directory, or a pool file with --from FILE"),
    ]:
        result = run(node_app, "export", *arguments, "-o", tmp_path / "out")
        assert result.exit_code == code, result.output
        assert words in " ".join(result.stderr.split())
        assert not (tmp_path / "out").exists()


def test_only_a_run_with_a_pool_has_a_pool_file(tmp_path):
    make(tmp_path / "run")
    result = run(coordinator_app, "export", tmp_path / "run", "--pool", tmp_path / "out.zo")
    assert result.exit_code == Exit.INPUT
    assert "a run with policy = 'private' has no pool" in " ".join(result.stderr.split())
    neither = run(coordinator_app, "export", tmp_path / "run")
    assert neither.exit_code == Exit.INPUT
    assert "give -o DIR, or of a pool run --pool FILE" in neither.stderr


@pytest.fixture
def state(tmp_path):
    """A node's state after three rounds."""
    make(tmp_path / "run")
    assert run(coordinator_app, "export", tmp_path / "run", "-o", tmp_path / "state").exit_code == 0
    return tmp_path / "state"


@pytest.mark.parametrize("how", [(), ("--merge",)])
def test_a_full_disk_is_said_and_leaves_nothing_behind(state, tmp_path, monkeypatch, how):
    def full(*_arguments, **_options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("node.adapter.save_file", full)
        patched.setattr("transformers.modeling_utils.safe_save_file", full)
        result = run(node_app, "export", state, "-o", tmp_path / "out", *how)
    assert result.exit_code == Exit.STORAGE, result.output
    assert "No space left on device" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run(node_app, "export", state, "-o", tmp_path / "out", *how).exit_code == 0


def test_a_damaged_snapshot_is_called_damaged(state, tmp_path):
    content = bytearray((state / "snapshot.zo").read_bytes())
    content[-9] ^= 1
    (state / "snapshot.zo").write_bytes(content)
    result = run(node_app, "export", state, "-o", tmp_path / "out")
    assert result.exit_code == Exit.DAMAGED, result.output
