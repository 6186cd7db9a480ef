"""A node's state directory: one process at a time, and nothing in it that is trusted without proof."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from node.state import StateBusyError, StateDirectory, StateError, load_result
from transport.keys import KeyFileError
from zo.replica import Replica
from zo.weights import zeros


@pytest.fixture
def manifest(make_manifest):
    return make_manifest()


@pytest.fixture
def replica(manifest):
    return Replica(manifest, np.arange(500, dtype=np.int32), round=3, head=bytes(16))


@pytest.fixture
def state(tmp_path):
    state = StateDirectory(tmp_path / "deep" / "state")
    with state.lock():
        yield state


def test_what_was_saved_is_there_again(state, manifest, replica):
    assert state.agent(0).load(manifest.run_id) is None
    state.save_manifest(manifest)
    assert state.agent(0).load(manifest.run_id) is None
    state.agent(0).save(replica, manifest)
    loaded, restored = state.agent(0).load(manifest.run_id)
    assert loaded == manifest
    assert (restored.round, restored.head, restored.digest()) == (3, bytes(16), replica.digest())


def test_another_runs_state_is_none(state, manifest, replica, make_manifest):
    state.save_manifest(manifest)
    state.agent(0).save(replica, manifest)
    assert state.agent(0).load(make_manifest(rank=5).run_id) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"hello = 3", b"[run]\n", b"\x00" * 100])
@pytest.mark.parametrize("file", ["manifest.toml", "snapshot.zo"])
def test_damaged_state_is_as_good_as_none(state, manifest, replica, file, content):
    state.save_manifest(manifest)
    state.agent(0).save(replica, manifest)
    (state.path / file).write_bytes(content)
    assert state.agent(0).load(manifest.run_id) is None


def test_weights_of_another_run_beside_this_manifest_are_none(state, manifest, replica, make_manifest):
    state.save_manifest(manifest)
    other = make_manifest(rank=5)
    state.agent(0).save(Replica(other, zeros(500)), other)
    assert state.agent(0).load(manifest.run_id) is None


def test_a_save_that_fails_keeps_what_was_there(state, manifest, replica, monkeypatch):
    state.save_manifest(manifest)
    state.agent(0).save(replica, manifest)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match=r"cannot write .*snapshot\.zo: No space left on device"):
        state.agent(0).save(Replica(manifest, zeros(500)), manifest)
    assert state.agent(0).load(manifest.run_id)[1].digest() == replica.digest()


def test_what_is_set_aside_can_be_read_there_and_is_not_gone_on_from(state, make_manifest):
    manifest = make_manifest(count=3)
    assert state.set_aside() is None, "there was nothing"
    key = state.keys()
    state.save_manifest(manifest)
    for number in (1, 2):
        for agent in (0, 2):
            head = bytes([number]) * 16
            state.agent(agent).save(Replica(manifest, zeros(500), number, head, agent), manifest)
        aside = state.set_aside()
        assert aside == state.path / f"set-aside-{number}"
        for agent in (0, 2):
            assert state.agent(agent).load(manifest.run_id) is None
            assert load_result(aside, agent)[1].round == number
    assert state.keys() == key, "it stays the same node"


def test_weights_that_cannot_be_set_aside_stay(state, manifest, replica, monkeypatch):
    state.save_manifest(manifest)
    state.agent(0).save(replica, manifest)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copy", full)
    with pytest.raises(
        StateError, match=r"cannot set the saved weights aside in .*set-aside-1: No space left"
    ):
        state.set_aside()
    assert state.agent(0).load(manifest.run_id)[1].digest() == replica.digest()


def test_the_key_is_made_once_and_only_the_owner_can_read_it(state):
    assert state.keys() == state.keys()
    assert stat.S_IMODE((state.path / "node.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_a_damaged_key_is_an_error_and_not_a_new_identity(state):
    state.keys()
    (state.path / "node.key").write_text("nonsense")
    with pytest.raises(KeyFileError):
        state.keys()


def test_the_private_seed_follows_from_the_key_and_is_not_part_of_it(state, tmp_path):
    seed = state.private_seed()
    assert seed == state.private_seed()
    assert 0 <= seed < 2**64
    assert seed.to_bytes(8, "little") not in state.keys().secret
    other = StateDirectory(tmp_path / "other")
    with other.lock():
        assert other.private_seed() != seed


def test_a_second_node_in_the_same_directory_is_told_what_to_do(state):
    with pytest.raises(StateBusyError, match="give it its own --name"), StateDirectory(state.path).lock():
        pass


def test_the_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "state"
    program = (
        "import sys, pathlib, node.state\n"
        f"with node.state.StateDirectory(pathlib.Path({str(path)!r})).lock():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StateBusyError), StateDirectory(path).lock():
            pass
        process.kill()
        process.wait(30)
    with StateDirectory(path).lock():
        pass


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StateError, match="cannot write the state directory"),
        StateDirectory(tmp_path / "file").lock(),
    ):
        pass


def test_the_result_of_a_node(state, manifest, replica):
    with pytest.raises(StateError, match=r"holds no weights yet: cannot read .*manifest\.toml"):
        load_result(state.path)
    state.save_manifest(manifest)
    with pytest.raises(StateError, match=r"holds no weights yet: cannot read .*snapshot\.zo"):
        load_result(state.path)
    state.agent(0).save(replica, manifest)
    assert load_result(state.path)[1].digest() == replica.digest()
    (state.path / "snapshot.zo").write_bytes(b"x")
    with pytest.raises(StateError, match="not a snapshot"):
        load_result(state.path)


def test_weights_that_are_wrong_can_be_dropped(state, manifest, replica):
    state.save_manifest(manifest)
    state.agent(0).save(replica, manifest)
    key = state.keys()
    state.agent(0).drop_weights()
    assert state.agent(0).load(manifest.run_id) is None
    assert state.keys() == key
    state.agent(0).drop_weights()  # there may be none


# ---- a snapshot on its way ------------------------------------------------------------------------------------------

CONTENT, OTHER = bytes(range(16)), bytes(16)


def test_pieces_are_there_again_after_a_stop(state):
    assert state.agent(0).load_download() is None
    state.agent(0).keep_piece(CONTENT, b"abc")
    state.agent(0).keep_piece(CONTENT, b"def")
    download = state.agent(0).load_download()
    assert (download.content, bytes(download.data)) == (CONTENT, b"abcdef")
    assert download.wanted() == [6]


def test_pieces_of_another_snapshot_take_the_place_of_the_first(state):
    state.agent(0).keep_piece(CONTENT, b"abc")
    state.agent(0).keep_piece(OTHER, b"xyz")
    assert len(list(state.path.glob("*.part"))) == 1
    assert bytes(state.agent(0).load_download().data) == b"xyz"


def test_a_download_that_is_done_leaves_nothing(state):
    state.agent(0).keep_piece(CONTENT, b"abc")
    state.agent(0).drop_download()
    assert state.agent(0).load_download() is None
    assert list(state.path.glob("*.part")) == []


def test_a_part_with_a_name_of_its_own_is_passed_over(state):
    (state.path / "notes.part").write_bytes(b"")
    assert state.agent(0).load_download() is None


def test_a_piece_that_cannot_be_kept_is_an_error(state, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(state.path), "open", full)
    with pytest.raises(StateError, match=r"cannot write .*\.part: No space left"):
        state.agent(0).keep_piece(CONTENT, b"abc")
