"""First-order estimators: exact slopes of a batch's loss along directions, by a backward pass or by forward mode.

Decides how the loss becomes a differentiable function of the flat vector, and what of a base stands in the way. When it
is asked, on which batch, and what becomes of the slopes, is the caller's business.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from node.adapter import Adapter
from node.bnb import bitsandbytes as bnb
from node.data import AnyBatch
from node.estimators import EstimatorError
from node.frozen import Answers, frozen_backbone, once_per_batch
from node.losses import loss_with_graph

_INSIDE: Final = "model"


class Gradients:
    """The mean cross-entropy of batches as a differentiable function of the adapter's vector."""

    def __init__(self, adapter: Adapter) -> None:
        """Make the base differentiable; what it computes stays the same but for rounding.

        Layers of 8 and 4 bit are held as the floats that they stand for, from now on: bitsandbytes has no forward
        derivative of its kernels, and on a CPU no gradient either of the one it computes 4 bit with (0.50; torch goes
        on with a wrong one). That takes the memory of the base in float32.
        """
        self._adapter = adapter
        hold_as_floats(adapter.model)
        self._loss = _Loss(adapter.model)
        self._backbone = frozen_backbone(adapter)
        self._answers: Answers = deque(maxlen=1)

    def gradient(self, values: NDArray[np.float32], drawn: AnyBatch) -> tuple[float, NDArray[np.float32]]:
        """The loss of a batch and its gradient, (size,), by one backward pass.

        Args:
            values: (size,), where.
            drawn: the batch.

        Raises:
            EstimatorError: a kernel of the model has no gradient.
        """
        flat = torch.from_numpy(values).to(self._adapter.views.device).requires_grad_()
        try:
            loss = self._at(flat, drawn)
            (gradient,) = torch.autograd.grad(loss, flat)
        except (NotImplementedError, RuntimeError) as error:
            raise _explained("gradient", error) from error
        return float(loss.detach()), gradient.cpu().numpy()

    def slope(self, values: NDArray[np.float32], z: NDArray[np.int8], drawn: AnyBatch) -> tuple[float, float]:
        """The loss of a batch and its derivative along z, by forward mode: no ε, and no graph is kept.

        Args:
            values: (size,), where.
            z: (size,), −1 or +1.
            drawn: the batch.

        Raises:
            EstimatorError: a kernel of the model has no forward derivative.
        """
        device = self._adapter.views.device
        flat, along = torch.from_numpy(values).to(device), torch.from_numpy(z).to(device, torch.float32)
        try:
            # Of the fused kernels of attention none has a forward derivative; of what they stand for all have.
            with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                loss, slope, *_ = jvp(lambda each: self._at(each, drawn), (flat,), (along,))
        except (NotImplementedError, RuntimeError) as error:
            raise _explained("forward derivative", error) from error
        return float(loss), float(slope)

    def _at(self, flat: torch.Tensor, drawn: AnyBatch) -> torch.Tensor:
        parameters = {
            f"{_INSIDE}.{self._adapter.path_of(each.name)}": flat[each.offset : each.offset + each.size].view(
                each.shape
            )
            for each in self._adapter.layout.parameters
        }
        with once_per_batch(self._backbone, self._answers):
            found: torch.Tensor = functional_call(self._loss, parameters, (drawn,))
        return found


class _Loss(torch.nn.Module):
    """A model with its loss on top, so that parameters can be given to both at once."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(_INSIDE, model)

    def forward(self, drawn: AnyBatch) -> torch.Tensor:
        return loss_with_graph(self.get_submodule(_INSIDE), drawn)


def hold_as_floats(model: torch.nn.Module) -> None:
    """Replace layers of 8 and 4 bit, in place, by the float32 that they stand for."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.state_dict()  # after a first pass on a CPU it is packed for that kernel: this unpacks it, in place
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
            held = layer.weight.data if layer.state.CB is None else layer.state.CB
            weight = bnb.functional.int8_vectorwise_dequant(held, scale)
        else:
            continue
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        plain.bias = layer.bias
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, plain)


def _explained(what: str, error: Exception) -> EstimatorError:
    first = str(error).partition("\n")[0]
    return EstimatorError(f"this model has no {what} here: {first}. Join with --estimator two-sided")
