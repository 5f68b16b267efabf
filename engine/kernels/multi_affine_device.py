"""Launches multi_affine on a device: cuda/multi_affine.cu, which declares the same structs.

Legend: T tokens, N columns; S spans: the uses, and the gaps between them, which are copied unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.constants import MULTI_AFFINE_BLOCKS, THREADS, VECTOR_BYTES
from engine.kernels.launch import POINTER, SUFFIXES, DeviceTable, Kernel, Launcher, pack, struct_of

TOKENS = 128  # of one item
USE = struct_of(
    [("gain", POINTER), ("shift", POINTER)]
    + [(name, np.int64) for name in ("saved_row", "dgain", "dshift", "partial")]
    + [("start", np.int32), ("num_tokens", np.int32)]
)
ITEM = struct_of(
    [(name, np.int32) for name in ("use", "token", "end_token", "column", "split", "num_splits", "counter", "unused")]
)
LAUNCH = struct_of(
    [(name, POINTER) for name in ("uses", "items", "in", "saved", "out", "gradients", "partials", "counters")]
    + [(name, np.int64) for name in ("in_stride", "saved_stride", "out_stride")]
    + [("num_items", np.int32), ("width", np.int32)]
)


class AffineRows:
    """The uses of one stream as structs. `wanted`: whether each vector, in order, gets a gradient."""

    def __init__(
        self,
        bounds: Sequence[int],
        kinds: Sequence[int],
        vectors: Sequence[torch.Tensor],
        wanted: Sequence[bool] | None = None,
    ) -> None:
        self.bounds, self.vectors = bounds, vectors
        self.uses = np.zeros(len(kinds), USE)
        rest, flags = iter(vectors), iter(wanted or [False] * len(vectors))
        num_saved = num_gradients = 0
        for i, (row, kind) in enumerate(zip(self.uses, kinds, strict=True)):
            row["start"], row["num_tokens"] = bounds[2 * i], bounds[2 * i + 1] - bounds[2 * i]
            row["saved_row"], row["dgain"], row["dshift"] = num_saved, -1, -1
            num_saved += int(row["num_tokens"]) if kind & 1 else 0
            for bit, name in ((1, "gain"), (2, "shift")):
                if kind & bit:
                    row[name] = next(rest).data_ptr()
                    if next(flags):
                        row[f"d{name}"] = num_gradients
                        num_gradients += 1

    def spans(self, num_tokens: int, width: int) -> NDArray[Any]:
        """Return uses and gaps in the stream's order; gradients' places count floats."""
        ends = [0, *self.bounds, num_tokens]
        gaps = np.zeros(len(self.uses) + 1, USE)
        gaps["dgain"] = gaps["dshift"] = -1
        gaps["start"], gaps["num_tokens"] = ends[::2], np.subtract(ends[1::2], ends[::2])
        spans = np.concatenate([self.uses, gaps[gaps["num_tokens"] > 0]])
        for name in ("dgain", "dshift"):
            spans[name] = np.where(spans[name] < 0, -1, spans[name] * width)
        return spans


def forward(launcher: Launcher, rows: AffineRows, x_TN: torch.Tensor, y_TN: torch.Tensor) -> None:
    """Compute Y, all of it."""
    _run(launcher, "multi_affine", rows, x_TN, None, y_TN, None)


def backward(
    launcher: Launcher,
    rows: AffineRows,
    saved: torch.Tensor,
    dy_TN: torch.Tensor,
    dx_TN: torch.Tensor | None,
    gradients: torch.Tensor,
) -> None:
    """Compute dX, all of it, if there is one, and the gradients. `saved`: X's tokens of the uses with a gain."""
    _run(launcher, "multi_affine_backward", rows, dy_TN, saved, dx_TN, gradients)


def _run(
    launcher: Launcher,
    name: str,
    rows: AffineRows,
    input_TN: torch.Tensor,
    saved: torch.Tensor | None,
    out: torch.Tensor | None,
    gradients: torch.Tensor | None,
) -> None:
    num_tokens, width = input_TN.shape
    columns = THREADS * VECTOR_BYTES // input_TN.element_size()
    spans, device = rows.spans(num_tokens, width), input_TN.device
    has_sums_S = (spans["dgain"] >= 0) | (spans["dshift"] >= 0)
    key = ("affine", spans["num_tokens"].tobytes(), has_sums_S.tobytes(), width, columns)
    plan = launcher.get_or_create(
        key, lambda: _AffinePlan.of(spans["num_tokens"], has_sums_S, width, columns, launcher)
    )
    if not plan.num_items:
        return
    spans["partial"] = plan.partials_S
    uses = launcher.get_or_create(("affine uses", spans.tobytes()), lambda: launcher.upload(spans))
    partials = torch.empty(plan.num_partials if gradients is not None else 0, dtype=torch.float32, device=device)
    strides = {f"{key}_stride": 0 if t is None else t.stride(0) for key, t in (("saved", saved), ("out", out))}
    struct = pack(
        LAUNCH, uses=uses, items=plan.items, out=out, saved=saved, gradients=gradients, partials=partials,
        counters=plan.counters, in_stride=input_TN.stride(0), num_items=plan.num_items, width=width, **{"in": input_TN},
        **strides,
    )  # fmt: skip
    num_blocks = min(plan.num_items, MULTI_AFFINE_BLOCKS * launcher.num_multiprocessors)
    pointed = [input_TN, saved, out, gradients, partials, plan.counters, *rows.vectors]
    kernel = Kernel("multi_affine.cu", f"{name}_{SUFFIXES[input_TN.dtype]}")
    launcher.launch(kernel, num_blocks, 16, struct, [uses, plan.items], [t for t in pointed if t is not None])


@dataclass(frozen=True)
class _AffinePlan:
    """Work items on the device, shared by all modules of one width in a microbatch.

    The counters of split sums are zero between launches. `partials_S`: floats before each span's partial sums.
    """

    items: DeviceTable
    num_items: int
    partials_S: NDArray[np.int64]
    num_partials: int
    counters: torch.Tensor

    @classmethod
    def of(
        cls, num_tokens_S: NDArray[Any], has_sums_S: NDArray[np.bool_], width: int, columns: int, launcher: Launcher
    ) -> "_AffinePlan":
        items, partials_S, num_partials = work_items(num_tokens_S, has_sums_S, width, columns)
        counters = torch.zeros(int(items["counter"].max(initial=0)) + 1, dtype=torch.int32, device=launcher.device)
        return cls(launcher.upload(items), len(items), partials_S, num_partials, counters)


def work_items(
    num_tokens_S: NDArray[Any], has_sums_S: NDArray[np.bool_], width: int, columns: int
) -> tuple[NDArray[Any], NDArray[np.int64], int]:
    """Return (items, floats before each span's partial sums, floats of all). Sums are split every TOKENS.

    A span without tokens has one item, which writes zeros as its gradients.
    """
    splits_S = np.maximum(1, -(-num_tokens_S.astype(np.int64) // TOKENS))
    num_blocks = -(-width // columns)
    floats_S = np.where(has_sums_S & (splits_S > 1), splits_S * 2 * width, 0)
    sizes_S = splits_S * num_blocks
    use = np.repeat(np.arange(len(sizes_S)), sizes_S)
    place = np.arange(len(use)) - np.repeat(np.cumsum(sizes_S) - sizes_S, sizes_S)
    split, block = np.divmod(place, num_blocks)
    items = np.zeros(len(use), ITEM)
    items["use"], items["column"] = use, block * columns
    items["token"] = split * TOKENS
    items["end_token"] = np.minimum((split + 1) * TOKENS, num_tokens_S[use])
    items["split"], items["num_splits"] = split, splits_S[use]
    items["counter"] = use * num_blocks + block
    return items, np.cumsum(floats_S) - floats_S, int(floats_S.sum())
