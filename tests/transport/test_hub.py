"""Bases on the hub, from a cache as its library keeps it: no network is asked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from coordinator.rundir import RunDirectory
from node import embedded
from transport.base_files import BaseFilesError, digest
from transport.hub import PATTERNS, Found, find, spelled, split

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """A cache that holds one commit of owner/name, which is `main`."""
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(embedded.path(), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }


def found_with(cache, model):
    """What another process, whose cache that is, finds; an error as its words."""
    code = (
        "import sys, json\n"
        "from transport.hub import BaseFilesError, find\n"
        "try: print(json.dumps([str(part) for part in find(sys.argv[1])]))\n"
        "except BaseFilesError as error: sys.exit(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model], env=cache, capture_output=True, text=True, check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip()


@pytest.mark.parametrize("model", ["owner/name", "owner/name@main", f"owner/name@{COMMIT}"])
def test_a_name_is_found_with_the_commit_that_it_stands_for(cache, model):
    folder, name, revision = found_with(cache, model)
    assert (name, revision) == ("owner/name", COMMIT)
    assert digest(Path(folder)) == digest(embedded.path())


def test_all_that_a_base_is_of_is_fetched_and_no_more():
    wanted = ["chat_template.jinja", "config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    wanted += ["generation_config.json", "merges.txt", "tokenizer_config.json", "vocab.json"]
    others = ["README.md", "model.gguf", "pytorch_model.bin", "modeling.py"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=PATTERNS)) == wanted


@pytest.mark.parametrize("model", ["owner/name@other", "owner/another"])
def test_what_is_not_in_the_cache_is_said(cache, model):
    assert f"the base {model} is no directory here, not in the cache" in found_with(cache, model)


def test_a_directory_has_its_own_name_and_no_revision(tmp_path):
    (tmp_path / "base@home").mkdir()
    assert find(tmp_path / "base@home") == Found(tmp_path / "base@home", "base@home", "")
    assert split(str(tmp_path / "base@home")) == (str(tmp_path / "base@home"), None)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "~/nowhere/at-all", "a/b/c"])
def test_a_path_is_not_asked_of_the_hub(path):
    with pytest.raises(BaseFilesError, match=r"does not exist; name a directory with a config\.json"):
        find(path)


def test_names_and_revisions_are_spelled_as_they_are_split():
    assert split(spelled("owner/name", "v1")) == ("owner/name", "v1")
    assert split(spelled("owner/name", "")) == ("owner/name", None)


def test_a_run_on_a_base_of_the_hub_says_which_commit_it_read(cache, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "coordinator.cli", "init", str(run), "--model", "owner/name@main"]
    done = subprocess.run(command, env=cache, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    base = RunDirectory(run).manifest().base
    assert (base.name, base.revision, base.digest) == ("owner/name", COMMIT, digest(embedded.path()))
