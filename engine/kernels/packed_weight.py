"""The frozen weight of a linear operator in the layouts that oneDNN's CPU kernels read, made once at load.

    Y = X W + b;   dX = dY W^T

A library that is given a plain matrix packs it in every call, which few rows don't repay; a weight that trains would
have to be packed anew after every step, ours never. It is held twice beside the plain one, which exports and methods
that start from weights read: speed for bytes (docs/adr/0016).
Legend: T tokens, K inputs, N outputs.
"""

import os
import platform

import torch

_MACHINES = ("x86_64", "AMD64")  # what it was measured on, and found faster
# oneDNN compiles code, and keeps about 0.6 MB, for every number of rows that a layout is multiplied by: 1,024 of them,
# and PyTorch as many beside. A round asks for few, each of its layers again, and another costs under a millisecond.
_MAX_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


class PackedWeight:
    """W [K, N] in float32, on a CPU for which oneDNN packs: made by `of`."""

    def __init__(self, weight_KN: torch.Tensor) -> None:
        for name, capacity in _MAX_KEPT.items():
            os.environ.setdefault(name, capacity)  # read once, by the first operator that oneDNN runs in a process
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._forward, self._backward = reorder(weight_KN.T.contiguous()), reorder(weight_KN.contiguous())

    @classmethod
    def of(cls, weight_KN: torch.Tensor) -> "PackedWeight | None":
        """None where it can't be packed: on a GPU, in other types than float32, without oneDNN, for no outputs."""
        can = torch._C._has_mkldnn and platform.machine() in _MACHINES
        is_float = weight_KN.dtype == torch.float32 and weight_KN.device.type == "cpu"
        return cls(weight_KN) if can and is_float and weight_KN.numel() else None

    @property
    def nbytes(self) -> int:
        """Of both layouts, oneDNN's padding included."""
        return int(sum(torch.ops.mkldnn._nbytes(packed) for packed in (self._forward, self._backward)))

    def times(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """X W + b [T, N], outside of autograd."""
        return _product(x_TK, self._forward, bias_N)

    def gradient(self, dy_TN: torch.Tensor, dx_TK: torch.Tensor | None = None) -> torch.Tensor:
        """dY W^T [T, K], added to dX in place if there is one."""
        product_TK = _product(dy_TN, self._backward, None)
        return product_TK if dx_TK is None else dx_TK.add_(product_TK)


def _product(x_TK: torch.Tensor, packed: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    y_TN: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, packed, bias_N, "none", [], "")
    return y_TN
