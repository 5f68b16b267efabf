"""Inputs of operators that are not kept for backward: what made them makes them again, bit for bit, of tensors that are
kept anyway. On a CPU only, whose memory is the scarcer.

The newest that can be made again are known, and asked for by the operators that read them.
"""

from collections import deque
from collections.abc import Callable

import torch

from engine.kernels.multi_lora import Remake

_NEWEST = 3  # what q, k and v read is looked for when norms of queries and keys have been noted, too


class Remakes:
    """Of one forward pass."""

    def __init__(self) -> None:
        self._newest: deque[tuple[torch.Tensor, int, Remake]] = deque(maxlen=_NEWEST)

    def note(self, y: torch.Tensor, make: Callable[..., torch.Tensor], *sources: torch.Tensor) -> None:
        """`make(*sources)` is `y`, whose node of autograd keeps the sources: where there is none, nothing is noted."""
        if y.requires_grad and y.device.type == "cpu":
            self._newest.append((y, y._version, Remake(make, sources)))

    def of(self, x: torch.Tensor) -> Remake | None:
        """How `x` is made, if it is one of them or a view of all of one, unchanged."""
        for y, version, remake in self._newest:  # held: an address is not used twice
            if x.data_ptr() == y.data_ptr() and x.numel() == y.numel() and y._version == version:
                return remake
        return None

    def forget(self) -> None:
        self._newest.clear()
