"""Gradient norms of many tasks in one launch, with a flag for each that says whether it is finite.

    norm_u = sqrt(sum(g_u^2));   is_finite_u = norm_u is neither NaN nor infinite

Squares are summed in double: no float overflows on the way. Reads each gradient once. On CUDA, cuda/multi_grad_norm.cu.
Legend: U tasks, P parameters of one.
"""

from collections.abc import Sequence

import numpy as np
import torch

from engine.kernels import cupy_launcher
from engine.kernels.launch import POINTER, Kernel, Launcher, pack, struct_of

CHUNK = 1 << 16  # elements summed by one item
_DOUBLES = 1 << 20  # elements that a CPU has in double at once
TASK = struct_of([("gradient", POINTER), ("num_elements", np.int64), ("first_item", np.int32), ("num_items", np.int32)])
ITEM = struct_of([("task", np.int32), ("chunk", np.int32)])
LAUNCH = struct_of(
    [(name, POINTER) for name in ("tasks", "items", "sums", "counters", "norms", "is_finite")]
    + [("num_items", np.int32), ("chunk_elements", np.int32)]
)
_BLOCKS_PER_MULTIPROCESSOR = 8


def multi_grad_norm(gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(norms [U] float32, flags [U] int32: 1 where finite) of float32 gradients [P] each, on one device.

    Raises ValueError where a gradient is not float32, contiguous and on the first one's device.
    """
    for gradient_P in gradients:
        if gradient_P.dtype != torch.float32 or not gradient_P.is_contiguous():
            raise ValueError(f"gradients are contiguous float32, got {gradient_P.dtype}")
        if gradient_P.device != gradients[0].device:
            raise ValueError(f"gradients on {gradients[0].device} and {gradient_P.device}")
    if gradients and gradients[0].is_cuda:
        return launched(cupy_launcher.launcher_of(gradients[0].device), gradients)
    norms = [_norm(gradient_P) for gradient_P in gradients]
    norms_U = torch.stack(norms).float() if norms else torch.zeros(0)
    return norms_U, torch.isfinite(norms_U).int()


def _norm(gradient_P: torch.Tensor) -> torch.Tensor:
    """In double, part by part: torch copies what it is to sum in another type."""
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(gradient_P, _DOUBLES)]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm


def launched(launcher: Launcher, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`multi_grad_norm` by the kernel."""
    where = gradients[0].device
    sizes_U = np.array([gradient_P.numel() for gradient_P in gradients], np.int64)
    counts_U = np.maximum(1, -(-sizes_U // CHUNK))
    firsts_U = np.cumsum(counts_U) - counts_U
    tasks, items = np.zeros(len(gradients), TASK), np.zeros(int(counts_U.sum()), ITEM)
    tasks["gradient"] = [gradient_P.data_ptr() for gradient_P in gradients]
    tasks["num_elements"], tasks["first_item"], tasks["num_items"] = sizes_U, firsts_U, counts_U
    items["task"] = np.repeat(np.arange(len(gradients)), counts_U)
    items["chunk"] = np.arange(len(items)) - firsts_U[items["task"]]
    tables = [
        launcher.get_or_create(("grad_norm", rows.tobytes()), lambda rows=rows: launcher.upload(rows))  # type: ignore[misc]
        for rows in (tasks, items)
    ]
    sums = torch.empty(len(items), dtype=torch.float64, device=where)
    counters_U, is_finite_U = (torch.zeros(len(gradients), dtype=torch.int32, device=where) for _ in range(2))
    norms_U = torch.empty(len(gradients), device=where)
    struct = pack(
        LAUNCH, tasks=tables[0], items=tables[1], sums=sums, counters=counters_U, norms=norms_U,
        is_finite=is_finite_U, num_items=len(items), chunk_elements=CHUNK,
    )  # fmt: skip
    num_blocks = min(len(items), _BLOCKS_PER_MULTIPROCESSOR * launcher.num_multiprocessors)
    pointed = [sums, counters_U, norms_U, is_finite_U, *gradients]
    launcher.launch(Kernel("multi_grad_norm.cu", "multi_grad_norm"), num_blocks, 64, struct, tables, pointed)
    return norms_U, is_finite_U
