"""One worker of a first-order system over torch.distributed with gloo.

    python -m benchmarks.bandwidth.gloo_worker PLACE RANK WORLD PORT JSON

"gradients": every step all workers' gradients are averaged and each takes the same step of Adam. "diloco": every worker
walks so many local steps of AdamW, then the moves are averaged and followed by Nesterov's momentum (arXiv 2311.08105).
Rank 0 writes the values after every exchange to PLACE/gloo, for others to measure.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks.bandwidth import contest as contests

_TIMEOUT = timedelta(seconds=300)
_OUTER_MOMENTUM = 0.9


def averaged(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean over all workers, (size,) float32."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).numpy()


def gradients(learner: contests.Learner, settings: dict[str, Any], keep: Any) -> None:
    """Synchronous data parallelism."""
    values = learner.values
    first, second = np.zeros_like(values), np.zeros_like(values)
    for step in range(settings["exchanges"]):
        learner.load(values)
        gradient = averaged(learner.gradient())
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient**2 - second)
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        rate = settings["rate"] * (1 - step / settings["exchanges"])
        values = (values - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)).astype(np.float32)
        keep(step + 1, values)


def diloco(learner: contests.Learner, settings: dict[str, Any], keep: Any) -> None:
    """Local steps, and an outer optimiser on the mean of their moves."""
    values = learner.values
    momentum = np.zeros_like(values)
    optimizer = learner.adam(settings["rate"], decay=0.1)
    for exchange in range(settings["exchanges"]):
        learner.load(values)
        learner.walk(settings["local_steps"], optimizer)
        move = averaged(values - learner.values)
        momentum = _OUTER_MOMENTUM * momentum + move
        values = (values - settings["outer_rate"] * (move + _OUTER_MOMENTUM * momentum)).astype(np.float32)
        keep(exchange + 1, values)


def main() -> int:
    """Take part as one worker."""
    place, rank, world, port, settings = Path(sys.argv[1]), *map(int, sys.argv[2:5]), json.loads(sys.argv[5])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    learner = contests.Learner(contests.load(place), rank)
    learner.load(np.load(contests.load(place).start_path))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=_TIMEOUT)
    out = place / "gloo"

    def keep(exchange: int, values: NDArray[np.float32]) -> None:
        if rank == 0:
            np.save(out / "partial.npy", values)
            os.replace(out / "partial.npy", out / f"{exchange}.npy")

    dist.barrier()
    if rank == 0:
        (out / "ready").touch()
    {"gradients": gradients, "diloco": diloco}[settings["kind"]](learner, settings, keep)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
