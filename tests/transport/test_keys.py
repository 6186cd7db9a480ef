import os
import stat

import pytest

from transport.keys import KeyFileError, load_key, load_or_make_key, new_key_pair, save_key


@pytest.mark.attack
def test_a_key_file_is_the_owners_alone_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        save_key(tmp_path / "key", new_key_pair())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_key_reads_back_and_is_made_once(tmp_path):
    made = load_or_make_key(tmp_path / "key")
    assert load_or_make_key(tmp_path / "key") == made == load_key(tmp_path / "key")


def test_a_key_is_made_once_where_files_have_one_name_alone(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    made = load_or_make_key(tmp_path / "key")
    assert load_key(tmp_path / "key") == made
    with pytest.raises(FileExistsError):
        save_key(tmp_path / "key", new_key_pair())
    assert load_key(tmp_path / "key") == made
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_key_is_never_overwritten(tmp_path):
    save_key(tmp_path / "key", new_key_pair())
    with pytest.raises(FileExistsError):
        save_key(tmp_path / "key", new_key_pair())


def test_who_is_killed_while_a_key_is_made_has_none(tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", kill)
    with pytest.raises(KeyboardInterrupt):
        load_or_make_key(tmp_path / "key")
    monkeypatch.undo()
    assert not (tmp_path / "key").exists()
    (tmp_path / f".key.{os.getpid()}").write_text("what SIGKILL leaves")
    assert load_or_make_key(tmp_path / "key") == load_key(tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.attack
def test_the_secret_is_not_shown():
    pair = new_key_pair()
    assert pair.secret.hex() not in repr(pair)


@pytest.mark.attack
def test_a_key_that_others_can_read_is_refused_with_the_cure(tmp_path):
    save_key(tmp_path / "key", new_key_pair())
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(KeyFileError, match=r"mode 0644.*chmod 600"):
        load_key(tmp_path / "key")


@pytest.mark.parametrize("content", ["", "abc", "zz" * 32, "ab" * 31, "ab" * 33])
def test_a_malformed_key_file_is_refused(tmp_path, content):
    (tmp_path / "key").write_text(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(KeyFileError, match="64 hexadecimal digits"):
        load_key(tmp_path / "key")


def test_a_missing_key_file_is_said(tmp_path):
    with pytest.raises(KeyFileError, match="cannot read the key file"):
        load_key(tmp_path / "none")
