"""Names of directions: (node, sample, agent) in a run. The bits that follow are left to `reference`."""

from collections.abc import Iterable
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

RunKey: TypeAlias = tuple[int, int]
"""The Philox key of a run: two uint32."""

RUN_KEY_BYTES: Final = 8
UINT32_MAX: Final = 0xFFFF_FFFF

SEED_POOL: Final = 0xFFFF_FFFF
"""`node` of the seed pool; `sample` is the index in the pool."""
SHARED: Final = 0xFFFF_FFFE
"""`node` of directions that all nodes share; `sample` is that of the round."""
INITIAL: Final = 0xFFFF_FFFD
"""`node` of the run's frozen initial values (LoRA A); `sample` is the index of the module."""
AUDIT: Final = 0xFFFF_FFFC
"""`node` of the directions of public audits; `sample` is drawn by the coordinator."""
GROUP_0: Final = 0xFFFF_FF00
"""`node` of the directions of group 0; of group g `GROUP_0 + g`, up to `AUDIT`."""
MAX_NODE: Final = 0xFFFF_FEFF
"""The largest number a real node can have."""


class Direction(NamedTuple):
    """The name of a direction inside a run: three uint32."""

    node: int
    sample: int
    agent: int = 0


class Drawn(Direction):
    """A direction of the seed pool, and the sample that drew it.

    Attributes:
        by: that sample's number. The batch follows from it: by the index, a direction would always meet the same rows.
    """

    by: int


def run_key(run_id: bytes) -> RunKey:
    """The Philox key of a run: the first 8 bytes of its id as two little-endian uint32.

    Raises:
        ValueError: the id is shorter than 8 bytes.
    """
    if len(run_id) < RUN_KEY_BYTES:
        raise ValueError(f"a run id has at least {RUN_KEY_BYTES} bytes, got {len(run_id)}")
    return int.from_bytes(run_id[:4], "little"), int.from_bytes(run_id[4:8], "little")


def stack(directions: Iterable[Direction]) -> NDArray[np.uint32]:
    """The names as an array, (n, 3) uint32 of node, sample, agent: what `apply` takes.

    Raises:
        ValueError: a part of a name is not a uint32.
    """
    names = list(directions)
    for name in names:
        if not all(0 <= part <= UINT32_MAX for part in name):
            raise ValueError(f"node, sample and agent must be within 0 and 2^32 − 1, got {name}")
    return np.array(names, dtype=np.uint32).reshape(len(names), 3)
