"""A node as a process that starts in half a second: all of `NodeService`, and a small logistic loss for a model.

Its pace is a test's to decide: it probes a round only once the gate file names a later one. So a test can stop a swarm
between two rounds, do something terrible to it, and let it go on, without ever guessing how long anything takes.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from node.base import read_digest, read_tokenizer_digest
from node.service import NodeError, NodeService
from node.state import StateDirectory
from transport.ticket import parse_ticket
from zo.codes import NO_VOTE, encode
from zo.directions import Direction, run_key
from zo.replica import samples
from zo.spsa import projected_gradients


class Probed(NamedTuple):
    codes: np.ndarray
    loss: float

    @property
    def num_no_votes(self):
        return int(np.count_nonzero(self.codes == NO_VOTE))


class LogisticTrainer:
    """Binary logistic regression on 64 private rows; all nodes' labels come from one hidden vector."""

    def __init__(self, manifest, seed, gate, *, is_broken=False):
        size = manifest.adapter.size
        hidden = np.random.default_rng(0).standard_normal(size)
        self.rows = np.random.default_rng(seed).standard_normal((64, size)).astype(np.float32)
        self.labels = np.sign(self.rows @ hidden)
        self.manifest, self.seed, self.gate, self.is_broken = manifest, seed, gate, is_broken

    def initial_weights(self):
        return np.zeros(self.manifest.adapter.size, np.int32)

    def loss(self, weights):
        if self.is_broken:
            return float("nan")
        return float(np.logaddexp(0, -self.labels * (self.rows @ weights)).mean())

    def probe(self, weights, round, node, exponent):
        while self.gate is not None and round >= int(self.gate.read_text()):
            time.sleep(0.002)
        probing = self.manifest.probe
        names = [Direction(node, sample) for sample in samples(round, probing.directions)]
        key = run_key(self.manifest.run_id)
        gradients, loss = projected_gradients(self.loss, weights, key, names, probing.epsilon)
        return Probed(encode(gradients, exponent, np.random.default_rng([self.seed, round])), loss)

    def evaluate(self, weights):
        return self.loss(weights.astype(np.float32) * 2.0**-28)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ticket", type=parse_ticket)
    parser.add_argument("state", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--broken", action="store_true", help="every loss is NaN")
    arguments = parser.parse_args()
    assert "torch" not in sys.modules
    state = StateDirectory(arguments.state)
    with state.lock(), state.log_path.open("a", buffering=1) as log:
        service = NodeService(
            arguments.ticket,
            state,
            read_digest(arguments.base),
            read_tokenizer_digest(arguments.base),
            partial(
                LogisticTrainer,
                seed=state.private_seed(),
                gate=arguments.gate,
                is_broken=arguments.broken,
            ),
            name=arguments.state.name,
            connect_timeout_s=30.0,
            evaluate_every=0,
            show=lambda view: None,
            log=lambda record: print(json.dumps(record), file=log),
        )
        try:
            print(service.run(), flush=True)
        except NodeError as error:
            print(error, file=sys.stderr)
            sys.exit(error.code)
        print(f"no votes {service.view.num_no_votes}", flush=True)


if __name__ == "__main__":
    main()
