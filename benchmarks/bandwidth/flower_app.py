"""FedAvg of the contest's adapter as an app of Flower: float32 arrays down, local Adam, float32 arrays up.

Copied into a directory of its own and run there by Flower's processes, in their environment; nothing imports it here.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """So many rounds of FedAvg with every node, the values after each on disk."""
    config = context.run_config
    place, nodes = Path(str(config["place"])), int(config["nodes"])

    def keep(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        np.save(place / "flower" / "partial.npy", arrays.to_numpy_ndarrays()[0])
        os.replace(place / "flower" / "partial.npy", place / "flower" / f"{round}.npy")
        return None

    strategy = FedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes
    )
    first = ArrayRecord([np.load(place / "start.npy")])
    strategy.start(grid, first, num_rounds=int(config["rounds"]), evaluate_fn=keep)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Local steps of Adam on the node's own text."""
    from benchmarks.bandwidth import contest as contests

    config: Any = context.run_config
    learner = contests.Learner(
        contests.load(Path(str(config["place"]))), int(context.node_config["partition-id"])
    )
    learner.load(message.content["arrays"].to_numpy_ndarrays()[0])
    learner.walk(int(config["steps"]), learner.adam(float(config["rate"])))
    content = {"arrays": ArrayRecord([learner.values]), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)
