"""A node that only catches up: the whole `NodeService` over a real socket, no model, no torch. A process of its own.

    python -m benchmarks.light_node TICKET STATE --base DIR --until ROUND

Prints one JSON object when it has all commits up to a round, and leaves.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import command_line
from coordinator.trained import head_of
from node.base import read_digest, read_tokenizer_digest
from node.service import Leaving, NodeService, View
from node.state import StateDirectory
from transport.base_files import configuration, linear_shapes, tensor_shapes
from transport.session import Stage
from transport.ticket import parse_ticket
from zo.directions import run_key
from zo.initial import initial_weights
from zo.layout import lora_layout
from zo.manifest import Manifest


class Abstention(NamedTuple):
    """The result of a probe that measured nothing."""

    codes: NDArray[np.int8]
    loss: float
    num_no_votes: int


class Onlooker:
    """A trainer without a model: it knows the weights of round 0, which follow from the shapes of the base."""

    def __init__(self, manifest: Manifest, base: Path) -> None:
        self._manifest = manifest
        adapter, labels, tensors = manifest.adapter, manifest.task.head_labels, tensor_shapes(base)
        head = None if labels is None else head_of(configuration(base), tensors, len(labels))
        self._layout = lora_layout(linear_shapes(tensors), adapter.targets, adapter.rank, adapter.train, head)

    @property
    def estimator(self) -> str:
        """As the run says: it measures nothing."""
        return ""

    def initial_weights(self) -> NDArray[np.int32]:
        """The weights of round 0."""
        return initial_weights(self._layout, run_key(self._manifest.run_id), self._manifest.adapter.train)

    def probe(
        self,
        weights: NDArray[np.int32],
        round: int,
        node: int,
        exponent: int,
        agent: int = 0,
        walk_step: int = 0,
        importances: NDArray[np.int32] | None = None,
    ) -> Abstention:
        """No vote in any direction."""
        directions = self._manifest.probe.directions
        return Abstention(np.full(directions, -128, np.int8), float("nan"), directions)

    def audit(self, weights: NDArray[np.int32], sample: int, agent: int = 0) -> tuple[float, float]:
        """Nothing is measured."""
        return float("nan"), float("nan")

    def evaluate(self, weights: NDArray[np.int32]) -> float | None:
        """Nothing is held out."""
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Catch up, say what it took, leave."""
    parser = command_line("light_node", __doc__)
    parser.add_argument("ticket", type=parse_ticket)
    parser.add_argument("state", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--until", type=int, required=True)
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    state = StateDirectory(options.state)

    def show(view: View) -> None:
        is_there = view.stage in (Stage.FOLLOWING, Stage.REPORTED) and view.round >= options.until
        if is_there and not figures:
            up, down, socket = view.meter.total_up, view.meter.total_down, service.view.socket
            figures.update(
                seconds=perf_counter() - begin,
                payload_up=up.payload_bytes,
                payload_down=down.payload_bytes,
                zmtp_up=up.zmtp_bytes,
                zmtp_down=down.zmtp_bytes,
                kernel_up=None if socket is None else socket.bytes_sent,
                kernel_down=None if socket is None else socket.bytes_received,
                messages={kind: count.payload_bytes for kind, count in sorted(view.meter.down.items())},
            )
            raise Leaving

    with state.lock():
        begin = perf_counter()
        service = NodeService(
            options.ticket,
            state,
            read_digest(options.base),
            read_tokenizer_digest(options.base),
            lambda manifest: Onlooker(manifest, options.base),
            name=options.state.name,
            connect_timeout_s=30.0,
            evaluate_every=0,
            show=show,
            log=lambda record: None,
        )
        service.run()
        saved = state.agent(0).load(options.ticket.run_id)
    assert saved is not None
    figures |= {"round": saved[1].round, "digest": saved[1].digest().hex()}
    assert "torch" not in sys.modules
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
