"""multi_grad_norm and multi_adamw against torch: fused AdamW and clip_grad_norm_ of each task in turn."""

from typing import Any

import torch
from torch import nn

from benchmarks.kernel_timing import timed
from engine.kernels import multi_adamw, multi_grad_norm
from engine.kernels.launch import Launcher
from engine.kernels.multi_adamw import AdamWGroup


def sizes(is_small: bool = False) -> list[list[int]]:
    """Parameters of each task: 1, 16 and 64 tasks of LoRA ranks 8 to 64 on all linears of an 8B backbone."""
    if is_small:
        return [[100, 300]]
    rank_8 = 20_971_520
    return [[rank_8 * 2], [rank_8 * (1 + i % 4) for i in range(16)], [rank_8 // 2] * 64]


def measured(own: list[int], launcher: Launcher, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times of one step of all tasks, gradients left as they were."""
    groups = [
        AdamWGroup(i, *(torch.rand(size, device=device) for _ in range(4)), step=5, learning_rate=1e-4, max_norm=1.0)
        for i, size in enumerate(own)
    ]
    parameters = [nn.Parameter(group.parameters_P.clone()) for group in groups]
    for parameter, group in zip(parameters, groups, strict=True):
        parameter.grad = group.gradients_P.clone()
    fused = [torch.optim.AdamW([p], lr=1e-4, fused=device.type == "cuda") for p in parameters]

    def ours() -> None:
        norms, is_finite = multi_grad_norm.launched(launcher, [group.gradients_P for group in groups])
        multi_adamw.launched(launcher, groups, norms, is_finite)

    def by_torch() -> None:
        for parameter, optimizer in zip(parameters, fused, strict=True):
            nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()

    times = timed({"ours": [ours], "torch": [by_torch]}, rounds, device)
    return {
        "point": "norm, clip, AdamW",
        "parameters": sum(own),
        "tasks": len(own),
        "bytes": 36 * sum(own),
        "times": times,
    }
