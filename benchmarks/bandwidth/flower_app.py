"""FedAvg of the contest's adapter as an app of Flower: arrays down, local Adam, arrays up; float32, or moves in int8.

Copied into a directory of its own and run there by Flower's processes, in their environment; nothing imports it here.
In int8 everybody holds the same values: they begin with those of the seed, and follow the moves that come down, so
that what the rounding did on the way is known to all. A client keeps them in its context, as Flower lets it.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()
_NOTHING: list[Any] = [np.zeros(0, np.int8), np.zeros(0, np.float32)]
_KNOWN = "known"


class Int8(FedAvg):  # type: ignore[misc]  # Flower is in another environment
    """FedAvg whose messages, either way, are moves in int8."""

    def __init__(self, place: Path, **options: Any) -> None:
        super().__init__(**options)
        self._values, self._sizes = np.load(place / "start.npy"), np.load(place / "sizes.npy")
        self._rng = np.random.default_rng(0)
        self._down = _NOTHING

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Any:
        """The last move goes down, in place of all values."""
        return super().configure_train(server_round, ArrayRecord(self._down), config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """The mean of the moves, as it will go down."""
        from benchmarks.bandwidth.int8 import quantised, restored

        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid:
            return None, None
        moves = []
        for each in valid:
            codes, scales = each.content["arrays"].to_numpy_ndarrays()
            moves.append(restored(codes, scales, self._sizes))
        codes, scales = quantised(np.mean(moves, axis=0), self._sizes, self._rng)
        self._down = [codes, scales]
        self._values = self._values + restored(codes, scales, self._sizes)
        return ArrayRecord([self._values]), MetricRecord({"replies": len(valid)})


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """So many rounds of FedAvg with every node, the values after each on disk."""
    config = context.run_config
    place, nodes = Path(str(config["place"])), int(config["nodes"])

    def keep(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        np.save(place / "flower" / "partial.npy", arrays.to_numpy_ndarrays()[0])
        os.replace(place / "flower" / "partial.npy", place / "flower" / f"{round}.npy")
        return None

    options: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": nodes,
        "min_available_nodes": nodes,
    }
    strategy = Int8(place, **options) if config["int8"] else FedAvg(**options)
    first = ArrayRecord([np.load(place / "start.npy")])
    strategy.start(grid, first, num_rounds=int(config["rounds"]), evaluate_fn=keep)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Local steps of Adam on the node's own data; without any, noise: for a link what it is does not matter."""
    config: Any = context.run_config
    place, steps = Path(str(config["place"])), int(config["steps"])
    node = int(context.node_config["partition-id"])
    round = int(message.content["config"]["server-round"])
    received = message.content["arrays"].to_numpy_ndarrays()
    rng = np.random.default_rng((node, round))
    values = _followed(place, received, context) if config["int8"] else received[0]
    if steps:
        from benchmarks.bandwidth import contest as contests

        learner = contests.Learner(contests.load(place), node)
        learner.load(values)
        learner.skip((round - 1) * steps)  # every round is a process of its own
        learner.walk(steps, learner.adam(float(config["rate"])))
        walked = learner.values
    else:
        walked = values + rng.standard_normal(values.size, np.float32)
    reply: list[Any] = [walked]
    if config["int8"]:
        from benchmarks.bandwidth.int8 import quantised

        reply = list(quantised(walked - values, np.load(place / "sizes.npy"), rng))
    content = {"arrays": ArrayRecord(reply), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)


def _followed(place: Path, received: list[Any], context: Context) -> Any:
    """The values that everybody holds, after the move that came down; kept for the next round."""
    from benchmarks.bandwidth.int8 import restored

    codes, scales = received
    known: Any = context.state.get(_KNOWN)
    values = np.load(place / "start.npy") if known is None else known.to_numpy_ndarrays()[0]
    if codes.size:
        values = values + restored(codes, scales, np.load(place / "sizes.npy"))
    context.state[_KNOWN] = ArrayRecord([values])
    return values
