"""Where a model computes: which device is meant, and whether it is there.

The integer weights, the kernels and the codes stay on the host in any case: what goes to a GPU is the base, a batch,
and the float views of the adapter.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

AUTO: Final = "auto"


class DeviceError(ValueError):
    """There is no such device; the message says which there are."""


def device_of(name: str) -> torch.device:
    """The device that a name means: cpu, cuda, cuda:N, or auto for a GPU if there is one.

    Raises:
        DeviceError: it means none, or one that is not there.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO:
        return torch.device("cuda:0" if num_gpus else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise DeviceError(f"--device {name}: expected cpu, cuda, cuda:N or auto")
    if name == "cpu":
        return torch.device("cpu")
    number = int(found[1] or 0)
    if number >= num_gpus:
        reason = (
            "torch was installed without CUDA"
            if torch.version.cuda is None
            else f"torch sees {num_gpus} GPUs"
        )
        raise DeviceError(
            f"--device {name}: {reason}; use --device cpu, or install torch for this machine's GPU"
        )
    return torch.device(f"cuda:{number}")
