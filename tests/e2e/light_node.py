"""A node as a process that starts in half a second: all of `NodeService`, and a small logistic loss for a model.

Its pace is a test's to decide: it probes a round only once the gate file names a later one. So a test can stop a swarm
between two rounds, do something terrible to it, and let it go on, without ever guessing how long anything takes. For
the same reason it can be told to freeze as soon as it is in a certain state.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.soak_node import LogisticTrainer, Probed
from node.base import read_digest, read_tokenizer_digest
from node.service import NodeError, NodeService
from node.state import StateDirectory
from transport import sockets
from transport.session import Stage
from transport.ticket import parse_ticket
from zo import kernels
from zo.codes import encode
from zo.directions import run_key, stack
from zo.naming import naming
from zo.replica import samples

FREEZE_AT = {
    "connecting": lambda view: view.stage is Stage.CONNECTING,
    "loading": lambda view: view.notice == "loading the base",
    "catching-up": lambda view: view.stage is Stage.FOLLOWING and view.behind > 0,
    "fetching": lambda view: view.stage is Stage.FETCHING and view.fetched_bytes > 0,
    "probing": lambda view: False,  # the trainer knows
    "reported": lambda view: view.stage is Stage.REPORTED,
}


class MovingTrainer(LogisticTrainer):
    """Walks a few steps of gradient descent on the logistic loss, and reports the move."""

    estimator = "moves"

    def probe(self, weights, round, node, exponent, agent=0, walk_step=0, importances=None):
        self._before_probe(round)
        manifest, settings = self._manifest, self._manifest.moves
        values = weights * 2.0**-28
        walked = values.copy()
        for _ in range(settings.updates):
            margins = self._labels * (self._rows @ walked)
            walked += settings.rate * (self._rows.T @ (self._labels / (1 + np.exp(margins)))) / len(margins)
        names = naming(manifest).of_round(
            node, samples(round, settings.projections, manifest.samples_per_round), agent
        )
        moved = (walked - values).astype(np.float32)
        projected = -kernels.projections(moved, run_key(manifest.run_id), stack(names))
        rng = np.random.default_rng([self._seed, round])
        return Probed(encode(projected, exponent, rng), self.loss(values.astype(np.float32)))


class GatedTrainer(LogisticTrainer):
    """A logistic loss, that may be broken."""

    def __init__(self, manifest, seed, before_probe, is_broken):
        super().__init__(manifest, seed, before_probe)
        self.is_broken = is_broken

    def loss(self, weights):
        return float("nan") if self.is_broken else super().loss(weights)


def freeze():
    print("frozen", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ticket", type=parse_ticket)
    parser.add_argument("state", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--agents", type=lambda text: [int(each) for each in text.split(",")])
    parser.add_argument("--moves", action="store_true", help="report moves instead of slopes")
    parser.add_argument("--broken", action="store_true", help="every loss is NaN")
    parser.add_argument("--freeze-at", choices=FREEZE_AT, help="stop with SIGSTOP as soon as it is there")
    parser.add_argument("--heartbeat-ms", type=int, help="notice dead connections sooner")
    parser.add_argument("--start-over", action="store_true", help="as of zo-node join")
    parser.add_argument("--clock-jumps", action="store_true", help="days forwards and back, at every look")
    arguments = parser.parse_args()
    assert "torch" not in sys.modules
    if arguments.heartbeat_ms:
        sockets.HEARTBEAT_INTERVAL_MS = sockets.HEARTBEAT_TIMEOUT_MS = arguments.heartbeat_ms
        sockets._HANDSHAKE_MS = 5 * arguments.heartbeat_ms
    if arguments.clock_jumps:
        now, rng = time.time, random.Random(0)
        time.time = lambda: now() + rng.uniform(-1e6, 1e6)
    state = StateDirectory(arguments.state)
    is_there = FREEZE_AT.get(arguments.freeze_at, lambda view: False)

    def show(view):
        if is_there(view):
            freeze()

    def wait_at_gate(round):
        if arguments.freeze_at == "probing":
            freeze()
        while arguments.gate is not None and round >= int(arguments.gate.read_text()):
            time.sleep(0.002)

    with state.lock(), state.log_path.open("a", buffering=1) as log:
        seed = state.private_seed()
        if arguments.start_over:
            state.set_aside()
        service = NodeService(
            arguments.ticket,
            state,
            read_digest(arguments.base),
            read_tokenizer_digest(arguments.base),
            lambda manifest: (
                MovingTrainer(manifest, seed, wait_at_gate)
                if arguments.moves
                else GatedTrainer(manifest, seed, wait_at_gate, arguments.broken)
            ),
            name=arguments.state.name,
            connect_timeout_s=120.0,
            evaluate_every=0,
            agents=arguments.agents,
            show=show,
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
