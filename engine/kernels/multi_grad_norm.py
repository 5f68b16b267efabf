"""Gradient norms of many tasks in one launch, with a flag for each: whether it is finite.

    norm_u = sqrt(sum(g_u^2));   is_finite_u = norm_u is neither NaN nor infinite

Squares are summed in double, so that no float overflows. Reads each gradient once. On CUDA, cuda/multi_grad_norm.cu.
Legend: U tasks, P parameters of one.
"""

from collections.abc import Sequence

import numpy as np
import torch

from engine.kernels import cupy_launcher
from engine.kernels.constants import MULTI_GRAD_NORM_BLOCKS
from engine.kernels.launch import POINTER, Kernel, Launcher, pack, struct_of

CHUNK = 1 << 16  # elements summed by one item
_CPU_ELEMENTS = 1 << 20  # elements that a CPU converts to double at once
TASK = struct_of([("gradient", POINTER), ("num_elements", np.int64), ("first_item", np.int32), ("num_items", np.int32)])
ITEM = struct_of([("task", np.int32), ("chunk", np.int32)])
LAUNCH = struct_of(
    [(name, POINTER) for name in ("tasks", "items", "sums", "counters", "norms", "is_finite")]
    + [("num_items", np.int32), ("chunk_elements", np.int32)]
)


def multi_grad_norm(gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (norms [U] float32, flags [U] int32: 1 if finite) of float32 gradients [P] on one device.

    Raises ValueError if a gradient is not contiguous float32 on the device of the first one.
    """
    for gradient_P in gradients:
        if gradient_P.dtype != torch.float32 or not gradient_P.is_contiguous():
            raise ValueError(f"gradients must be contiguous float32, got {gradient_P.dtype}")
        if gradient_P.device != gradients[0].device:
            raise ValueError(f"gradients must be on one device, got {gradients[0].device} and {gradient_P.device}")
    if gradients and gradients[0].is_cuda:
        return launch_multi_grad_norm(cupy_launcher.launcher_of(gradients[0].device), gradients)
    norms = [_norm(gradient_P) for gradient_P in gradients]
    norms_U = torch.stack(norms).float() if norms else torch.zeros(0)
    return norms_U, torch.isfinite(norms_U).int()


def _norm(gradient_P: torch.Tensor) -> torch.Tensor:
    """Return the norm in double, part by part: torch converts a copy of what it sums."""
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(gradient_P, _CPU_ELEMENTS)]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm


def launch_multi_grad_norm(launcher: Launcher, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute norms and flags by the kernel."""
    device = gradients[0].device
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
    sums = torch.empty(len(items), dtype=torch.float64, device=device)
    counters_U, is_finite_U = (torch.zeros(len(gradients), dtype=torch.int32, device=device) for _ in range(2))
    norms_U = torch.empty(len(gradients), device=device)
    struct = pack(
        LAUNCH, tasks=tables[0], items=tables[1], sums=sums, counters=counters_U, norms=norms_U,
        is_finite=is_finite_U, num_items=len(items), chunk_elements=CHUNK,
    )  # fmt: skip
    num_blocks = min(len(items), MULTI_GRAD_NORM_BLOCKS * launcher.num_multiprocessors)
    pointed = [sums, counters_U, norms_U, is_finite_U, *gradients]
    launcher.launch(Kernel("multi_grad_norm.cu", "multi_grad_norm"), num_blocks, 64, struct, tables, pointed)
    return norms_U, is_finite_U
