"""Packed copies of a linear operator's frozen weight, in the layouts that oneDNN's CPU kernels read; made at load.

    Y = X W + b;   dX = dY W^T

A library packs a plain matrix in every call, which does not pay for few rows. A weight that trains would have to be
packed again after every step; a frozen one never. Two packed copies are held beside the plain weight, which exports and
methods that start from weights read: this trades bytes for speed (docs/adr/0016).
Legend: T tokens, K inputs, N outputs.
"""

import os
import platform

import torch

_MACHINES = ("x86_64", "AMD64")  # where packing was measured to be faster
# oneDNN compiles code, and keeps about 0.6 MB, for every number of rows that a layout is multiplied by: 1,024 of them,
# and PyTorch as many beside. A round asks for few, each of its layers again, and another costs under a millisecond.
_CACHE_CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


class PackedWeight:
    """W [K, N] in float32, packed by oneDNN for this CPU; created by `of`."""

    def __init__(self, weight_KN: torch.Tensor) -> None:
        for name, capacity in _CACHE_CAPACITIES.items():
            os.environ.setdefault(name, capacity)  # read once, by the first operator that oneDNN runs in a process
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._forward, self._backward = reorder(weight_KN.T.contiguous()), reorder(weight_KN.contiguous())

    @classmethod
    def of(cls, weight_KN: torch.Tensor) -> "PackedWeight | None":
        """Return the packed weight; None on a GPU, for types other than float32, without oneDNN, or without outputs."""
        can = torch._C._has_mkldnn and platform.machine() in _MACHINES
        is_float = weight_KN.dtype == torch.float32 and weight_KN.device.type == "cpu"
        return cls(weight_KN) if can and is_float and weight_KN.numel() else None

    @property
    def nbytes(self) -> int:
        """Bytes of both layouts, oneDNN's padding included."""
        return int(sum(torch.ops.mkldnn._nbytes(packed) for packed in (self._forward, self._backward)))

    def times(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """Return X W + b [T, N], outside of autograd."""
        return _product(x_TK, self._forward, bias_N)

    def gradient(self, dy_TN: torch.Tensor, dx_TK: torch.Tensor | None = None) -> torch.Tensor:
        """Return dY W^T [T, K], added to dX in place if there is one."""
        product_TK = _product(dy_TN, self._backward, None)
        return product_TK if dx_TK is None else dx_TK.add_(product_TK)


def _product(x_TK: torch.Tensor, packed: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    y_TN: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, packed, bias_N, "none", [], "")
    return y_TN
