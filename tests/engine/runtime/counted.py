"""A fake device that computes its time from counted work: the same seconds on any machine, busy or not."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_LAUNCH_SECONDS = 2e-6
_FLOPS_PER_SECOND = 50e9
_BYTES_PER_SECOND = 10e9


class CountedDevice(TorchDispatchMode):
    """Counts for every operator a launch, its FLOPs as PyTorch counts them, and a pass over each tensor that it reads
    or writes. Views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def clock(self) -> float:
        return self.seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.seconds += _LAUNCH_SECONDS + flops / _FLOPS_PER_SECOND + num_bytes / _BYTES_PER_SECOND
        return out
