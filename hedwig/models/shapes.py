"""Modules that have shapes and no values: what is built before weights are loaded into it, counted or compared.

PyTorch's meta device allocates nothing, but modules still initialise themselves on it: each draw goes through a Python
decomposition, and the first one imports PyTorch's compiler, which takes 3 s of every process. Nobody sees those values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["shapes_only"]

_DRAWS = (Tensor.normal_, Tensor.uniform_)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors and modules made inside the block are on the meta device, and initialising them does nothing."""
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
