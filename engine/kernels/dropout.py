"""Dropout masks from a key of the dropped element, independent of its place in a batch.

The bits of a site are Philox4x64-10 (Salmon et al., SC'11) with
    key     = (task seed, step * 2**32 + site)
    counter = (position * ceil(K / 16) + block, 0, 0, 0)
One block gives 4 x 64 bits = 16 lanes of 16 bits, little end first; column c of the token at stream position p is lane
c % 16 of block c // 16. The element is kept where its lane >= min(65535, round(probability * 65536)).

Legend: L tokens of a range, K width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.constants import DROPOUT_LANES
from engine.kernels.transfer import to_device


def keep_mask(
    seed: int, step: int, site: int, positions_L: NDArray[np.int64], width: int, probability: float
) -> torch.Tensor:
    """Return the elements that stay, [L, K] bool. Equal keys give equal masks, on any machine and in any batch."""
    num_blocks = -(-width // DROPOUT_LANES)
    key = np.array([seed % 2**64, ((step << 32) + site) % 2**64], dtype=np.uint64)
    runs = np.split(
        positions_L, np.flatnonzero(np.diff(positions_L) != 1) + 1
    )  # of consecutive positions: one call each
    words = [np.empty(0, "<u8")] + [
        _blocks(key, int(run[0]) * num_blocks, len(run) * num_blocks) for run in runs if len(run)
    ]
    lanes_LK = np.concatenate(words).view("<u2").reshape(len(positions_L), num_blocks * DROPOUT_LANES)[:, :width]
    return torch.from_numpy(lanes_LK >= _threshold(probability))


@dataclass(frozen=True)
class DropoutMask:
    """A mask [L, K] by its key: a call makes it on `device`; the kernels make the same bits from the key."""

    seed: int
    step: int
    site: int
    positions_L: NDArray[np.int64]
    width: int
    probability: float
    device: torch.device | str = "cpu"
    device_step: torch.Tensor | None = None  # int64 in the device's memory, updated by its owner
    device_positions_T: torch.Tensor | None = None  # int64, of the whole stream: kernels read those of their tokens

    def __call__(self) -> torch.Tensor:
        mask = keep_mask(self.seed, self.step, self.site, self.positions_L, self.width, self.probability)
        return to_device(mask, torch.device(self.device))

    @property
    def key(self) -> tuple[int, int]:
        """The two words of Philox's key."""
        return self.seed % 2**64, ((self.step << 32) + self.site) % 2**64

    @property
    def threshold(self) -> int:
        """The least value of a lane that is kept; 0 keeps all."""
        return _threshold(self.probability)


def drop(x_LK: torch.Tensor, make_mask: Callable[[], torch.Tensor], scale: float) -> torch.Tensor:
    """Return x times `scale` where the mask keeps it, else 0. Nothing is saved for backward: the mask is made again."""
    result: torch.Tensor = _Dropout.apply(x_LK, make_mask, scale)  # type: ignore[no-untyped-call]
    return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LK: torch.Tensor, make_mask: Callable[[], torch.Tensor], scale: float) -> torch.Tensor:
        ctx.make_mask, ctx.scale = make_mask, scale
        return torch.where(make_mask(), x_LK, 0) * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.where(ctx.make_mask(), grad_outputs[0], 0) * ctx.scale, None, None


def keep_scale(probability: float) -> float:
    """Return the factor of kept elements: the inverse of the exact probability to be kept."""
    return 65536 / (65536 - _threshold(probability))


def _threshold(probability: float) -> int:
    return min(65535, round(probability * 65536))  # never all: kept elements need a finite scale


def _blocks(key: NDArray[np.uint64], first: int, count: int) -> NDArray[np.uint64]:
    """Return blocks `first` to `first + count`, four words each. numpy increments its counter before each block."""
    counter = (first - 1) % 2**256
    words = np.array([(counter >> (64 * i)) % 2**64 for i in range(4)], dtype=np.uint64)
    return np.random.Philox(key=key, counter=words).random_raw(4 * count).astype("<u8", copy=False)
