"""What all tests share: property tests that draw the same examples every time, and a run that needs no model."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings

from zo import kernels
from zo.manifest import Adapter, BaseModel, Manifest, Parity, Probing, Run, Schedule, validate

WITH_GPU = "ZO_TEST_CUDA" in os.environ
if not WITH_GPU:
    # What tests compare, they compute on CPUs, on every machine; torch sees this before it looks for devices.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# No deadline: a busy machine fails no test.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the end-to-end tests out to the workers of xdist, each of which gets a stretch of the list.

    They mostly wait for processes of their own; all in one stretch, they would be what everybody waits for at the end.
    Every second worker begins with its own, the others end with theirs, so that there are always some of both kinds.
    """
    if not WITH_GPU:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: make test-cuda"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    waiting = [item for item in items if item.get_closest_marker("e2e")]
    others = [item for item in items if not item.get_closest_marker("e2e")]
    stretches = []
    for worker in range(workers):
        mine = waiting[worker::workers]
        part = others[len(others) * worker // workers : len(others) * (worker + 1) // workers]
        stretches += [mine, part] if worker % 2 else [part, mine]
    items[:] = [item for stretch in stretches for item in stretch]


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels() -> None:
    """On a fresh machine the first command says that it compiles; tests of what commands say come after that."""
    kernels.compile_kernels()


MakeManifest = Callable[..., Manifest]


@pytest.fixture(scope="session")
def make_manifest() -> MakeManifest:
    """A manifest of 500 parameters; a field of any section can be set by its name."""

    def make(**given: object) -> Manifest:
        manifest = Manifest(
            protocol=1,
            run=Run(name="test", rounds=20, nonce="0123456789abcdef" * 2),
            base=BaseModel(name="none", digest="b0" * 16, tokenizer_digest="70" * 16),
            adapter=Adapter(
                targets=("q_proj", "v_proj"),
                rank=4,
                alpha=8.0,
                train="B",
                size=500,
                layout_digest="1a" * 16,
            ),
            probe=Probing(epsilon=0.01, directions=2, batch_size=8, sequence_length=128),
            schedule=Schedule(step=0.02, decay="linear", smoothing=3, first_exponent=-4),
            parity=Parity(digest_every=4, share_loss=True),
        )
        for section in (
            "run",
            "base",
            "task",
            "adapter",
            "agents",
            "directions",
            "probe",
            "moves",
            "codes",
            "schedule",
            "parity",
            "audit",
        ):
            struct = getattr(manifest, section)
            mine = {name: given.pop(name) for name in struct.__struct_fields__ if name in given}
            manifest = msgspec.structs.replace(manifest, **{section: msgspec.structs.replace(struct, **mine)})
        assert not given, f"no such field: {given}"
        return validate(manifest)

    return make


@pytest.fixture(scope="session")
def save_model() -> Callable[[Any, Path], Path]:
    """Saves a small model of any architecture, with the tokenizer of the embedded one."""
    from node import embedded

    def save(model: Any, directory: Path) -> Path:
        model.save_pretrained(directory)
        for file in embedded.path().glob("tokenizer*"):
            shutil.copyfile(file, directory / file.name)
        return directory

    return save


@pytest.fixture(scope="session")
def encoder(save_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small BERT without a head and with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1024,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return save_model(BertModel(config), tmp_path_factory.mktemp("encoder"))
