"""How much memory a node needs, by measurement: every buffer of numpy and torch that is alive is counted, to the byte.

Not the resident memory of the process, which depends on allocators and on what else was imported.
"""

import gc
import tracemalloc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from node import embedded
from node.base import load_base
from node.data import pack
from node.language import LanguageTrainer
from zo.commit import Commit
from zo.layout import lora_layout
from zo.replica import Replica

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST = 12
"""Bytes per parameter and agent, beside inference and what one batch needs."""


class Buffers(TorchDispatchMode):
    """While it holds, the largest number of bytes alive at once in tensors and arrays that were made within it."""

    peak = 0

    def __init__(self):
        super().__init__()
        self._storages = {}

    def __enter__(self):
        gc.collect()
        tracemalloc.start(1)
        return super().__enter__()

    def __exit__(self, *error):
        self.look()
        tracemalloc.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        known = {each.untyped_storage()._cdata for each in before}
        found = function(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in known:
                storage = each.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.look()
        return found

    def look(self):
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        tensors = sum(nbytes for _, nbytes in self._storages.values())
        _, arrays = tracemalloc.get_traced_memory()  # the most since the last look
        tracemalloc.reset_peak()
        self.peak = max(self.peak, tensors + arrays)


@pytest.fixture(scope="module")
def rows():
    tokenizer = load_base(embedded.path(), threads=1).tokenizer
    return pack(["Return the absolute value of the number. " * 4], tokenizer, 16)


def most_in_rounds(manifest, rows):
    """The most bytes that a node which has been started holds while it probes, applies, digests and evaluates."""
    trainer = LanguageTrainer(
        manifest, load_base(embedded.path(), threads=1), rows, rows, private_seed=1, threads=1
    )
    trainer.rehearse(at_once=0)
    with Buffers() as buffers:
        replicas = [
            Replica(manifest, trainer.initial_weights(), agent=agent)
            for agent in range(manifest.agents.count)
        ]
        buffers.look()
        buffers.peak = 0  # a start needs its weights twice for a moment, when no batch is in memory
        for round in range(2):
            for replica in replicas:
                codes = trainer.probe(replica.weights, round, 0, -4, replica.agent).codes
                replica.apply(
                    Commit(
                        round=round,
                        steps=(1000,),
                        exponents=(-4,),
                        participants=(0,),
                        codes=codes.tobytes(),
                        previous=replica.head,
                    )
                )
                replica.digest()
                trainer.evaluate(replica.weights)
    return buffers.peak + trainer._adapter.views.nbytes  # made by the rehearsal


@pytest.mark.parametrize(("agents", "sides"), [(1, 1), (4, 2)])
def test_a_node_in_its_rounds_needs_at_most_twelve_bytes_per_parameter_and_agent(
    make_manifest, rows, agents, sides
):
    """Every agent's weights are 4, and the two views that all of them share are 8.

    What does not grow with the adapter cancels out between two ranks: the base, activations, Python's own objects.
    """
    base = load_base(embedded.path(), threads=1)
    found, sizes = [], []
    for rank in (32, 128):
        layout = lora_layout(base.linear_shapes, TARGETS, rank, "AB")
        manifest = make_manifest(
            targets=TARGETS,
            rank=rank,
            train="AB",
            size=layout.size,
            layout_digest=layout.digest().hex(),
            batch_size=1,
            sequence_length=16,
            count=agents,
            sides=sides,
        )
        found.append(most_in_rounds(manifest, rows))
        sizes.append(layout.size)
    a_parameter = (found[1] - found[0]) / (sizes[1] - sizes[0])
    # A low rank's own activations grow with it as well: rank × tokens of a batch, in every adapted module.
    assert a_parameter == pytest.approx(4 * agents + 8, abs=0.1)
    assert a_parameter <= MOST * agents + 0.1
