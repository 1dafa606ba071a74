"""A geolocator whose weights are halves, as it serves: a few rows are multiplied in the time that reading them takes.

One embedding is answered in less than a millisecond, and most of that is reading the weights of projection and
classifier, 8 MB in fp32 for 2,000 cells. They are rounded to fp16 once, where a trained head is opened; products and
sums stay in fp32. The rounded weights are the weights from then on, when the index is built and the radius calibrated,
in a prediction of the whole test set and in the service, for one query and for many. No logit moves by more than three
thousandths of their standard deviation (tests/test_retrieve_halves.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hedwig.index import kernel
from hedwig.models.geolocator import Geolocator

__all__ = ["HalfLinear", "in_halves"]

_FEW = 12  # rows; of more a matrix product is faster


def in_halves(geolocator: Geolocator) -> Geolocator:
    """The geolocator for inference, with the weights of its layers rounded to fp16.

    Raises:
        ValueError: a weight is too large for it.
    """
    return geolocator.with_layers(HalfLinear)


class HalfLinear(nn.Module):
    """A linear layer with weights that fp16 can hold.

    Args:
        weight: (out, in); rounded.
        bias: (out,), or None; kept as it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        halves = weight.to(torch.float16)
        if not torch.isfinite(halves).all():
            raise ValueError(f"A weight of {weight.abs().max():g} does not fit into fp16; was the training stable?")
        self.weight = nn.Parameter(halves.to(weight.dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        here = weight.device.type == "cpu" and weight.dtype == torch.float32 and kernel.is_available()
        self._products = kernel.Products(halves.contiguous().numpy()) if here else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) to (B, out)."""
        if self._products is None or len(x) > _FEW or x.requires_grad:
            return F.linear(x, self.weight, self.bias)
        found = torch.from_numpy(self._products(x.numpy()))
        return found if self.bias is None else found.add_(self.bias)
