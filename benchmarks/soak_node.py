"""A node of the soak: all of `NodeService` over a real socket, a logistic loss for a model. It starts in half a second.

python -m benchmarks.soak_node TICKET STATE --base DIR
"""

import json
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import command_line
from node.base import read_digest, read_tokenizer_digest
from node.service import NodeError, NodeService
from node.state import StateBusyError, StateDirectory, StateError
from transport.exits import Exit
from transport.ticket import parse_ticket
from zo import kernels
from zo.codes import NO_VOTE, encode
from zo.directions import AUDIT, Direction, run_key
from zo.manifest import Manifest
from zo.naming import naming
from zo.replica import samples
from zo.spsa import finite_mean, projected_gradients
from zo.walk import walk

_NUM_ROWS: Final = 64
_RIDGE: Final = 0.01
"""Keeps the weights in their range however long the soak lasts: separable rows alone would push them out for ever."""


class Probed(NamedTuple):
    """What a probe gave."""

    codes: NDArray[np.int8]
    loss: float

    @property
    def num_no_votes(self) -> int:
        """Directions without a finite loss."""
        return int(np.count_nonzero(self.codes == NO_VOTE))


class LogisticTrainer:
    """Binary logistic regression on 64 private rows, with a small ridge; all nodes' labels come from one hidden vector.

    Codes are a function of weights, seed and round alone.
    """

    def __init__(self, manifest: Manifest, seed: int, before_probe: Callable[[int], None]) -> None:
        """Draw the rows.

        Args:
            manifest: of the run; its adapter's size is the number of features.
            seed: of this node's rows, and of the rounding of its codes.
            before_probe: called with the round; may take its time, and so sets the pace.
        """
        size = manifest.adapter.size
        hidden = np.random.default_rng(0).standard_normal(size)
        self._rows = np.random.default_rng(seed).standard_normal((_NUM_ROWS, size)).astype(np.float32)
        self._labels = np.sign(self._rows @ hidden)
        self._manifest, self._seed, self._before_probe = manifest, seed, before_probe

    @property
    def estimator(self) -> str:
        """As the run says."""
        return ""

    def initial_weights(self) -> NDArray[np.int32]:
        """Zeros."""
        return np.zeros(self._manifest.adapter.size, np.int32)

    def loss(self, weights: NDArray[np.float32]) -> float:
        """The loss at float weights, (size,) float32."""
        logistic = np.logaddexp(0, -self._labels * (self._rows @ weights)).mean()
        return float(logistic + _RIDGE * float(weights @ weights))

    def probe(
        self,
        weights: NDArray[np.int32],
        round: int,
        node: int,
        exponent: int,
        agent: int = 0,
        walk_step: int = 0,
        importances: NDArray[np.int32] | None = None,
    ) -> Probed:
        """The codes of an agent's round."""
        self._before_probe(round)
        probing, key = self._manifest.probe, run_key(self._manifest.run_id)
        rng = np.random.default_rng([self._seed + (agent << 64), round])
        losses = []

        def measured(at: NDArray[np.int32], names: Sequence[Direction]) -> NDArray[np.int8]:
            gradients, loss = projected_gradients(self.loss, at, key, names, probing.epsilon)
            losses.append(loss)
            return encode(gradients, exponent, rng, self._manifest.codes.bits)

        drawn = samples(round, probing.directions, self._manifest.samples_per_round)
        names = naming(self._manifest).of_round(node, drawn, agent, importances)
        codes = walk(measured, weights, key, names, probing.local_steps, walk_step)
        return Probed(codes, finite_mean(np.array(losses)))

    def audit(self, weights: NDArray[np.int32], sample: int, agent: int = 0) -> tuple[float, float]:
        """The losses on rows that all nodes have: the same, whatever is public."""
        public = LogisticTrainer(self._manifest, 0, lambda _: None)
        z = np.empty((2, weights.size), np.float32)
        name = Direction(AUDIT, sample, agent)
        kernels.perturbed(
            weights, run_key(self._manifest.run_id), name, self._manifest.probe.epsilon, out=(z[0], z[1])
        )
        return public.loss(z[0]), public.loss(z[1])

    def evaluate(self, weights: NDArray[np.int32]) -> float | None:
        """The training loss: there is nothing held out."""
        return self.loss(weights.astype(np.float32) * np.float32(2.0**-28))


def make_base(directory: Path, shape: tuple[int, int] = (64, 64)) -> Path:
    """Files of a base that nobody could load, but of which everybody can take shapes and digest."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "made-up"}')
    (directory / "tokenizer.json").write_text("{}")
    size = 4 * shape[0] * shape[1]
    header = {
        f"layers.0.self_attn.{name}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i, name in enumerate(("q_proj", "v_proj"))
    }
    encoded = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(2 * size))
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    """Take part until the run is over, or until Ctrl-C or SIGTERM."""
    parser = command_line("soak_node", __doc__)
    parser.add_argument("ticket", type=parse_ticket)
    parser.add_argument("state", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--probe-s", type=float, default=0.02, help="how long a probe takes (0.02)")
    parser.add_argument("--connect-timeout", type=float, default=120.0, metavar="S", help="(120)")
    options = parser.parse_args(arguments)
    state = StateDirectory(options.state)
    try:
        with state.lock():
            seed = state.private_seed()
            pace = np.random.default_rng(seed)

            def take_time(round: int) -> None:
                time.sleep(options.probe_s * pace.uniform(0.5, 1.5))

            service = NodeService(
                options.ticket,
                state,
                read_digest(options.base),
                read_tokenizer_digest(options.base),
                lambda manifest: LogisticTrainer(manifest, seed, take_time),
                name=options.state.name,
                connect_timeout_s=options.connect_timeout,
                evaluate_every=0,
                show=lambda view: None,
                log=lambda record: None,
            )
            sys.stdout.write(service.run() + "\n")
    except (NodeError, StateError, StateBusyError) as error:
        sys.stderr.write(f"error: {error}\n")
        if isinstance(error, NodeError):
            return error.code
        return Exit.BUSY if isinstance(error, StateBusyError) else Exit.STORAGE
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
