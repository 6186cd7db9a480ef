"""Imports bitsandbytes without torch's compiler, before peft imports it with that.

Some of its kernels are wrapped in `torch.compile` where they are defined, for which torch loads Dynamo and Inductor,
some hundred modules that a node has no other use for. The wrapped ones are the fall-backs for devices without kernels
of their own, and compile on their first call; here they compute as they are written, on every machine alike.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def _as_it_is(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    """What takes the place of `torch.compile`, with arguments of its own or without."""
    return _as_it_is if function is None else function


_compile = torch.compile
torch.compile = _as_it_is  # type: ignore[assignment]
try:
    with suppress(ImportError):  # who needs it says so
        import bitsandbytes as bitsandbytes
finally:
    torch.compile = _compile
