"""Times multi_adamw against torch: clip_grad_norm_'s factor and fused AdamW of each task in turn, with given norms."""

from typing import Any

import torch
from torch import nn

from benchmarks.kernel_timing import timed
from engine.kernels import multi_adamw
from engine.kernels.launch import Launcher
from engine.kernels.multi_adamw import AdamWGroup


def sizes(is_small: bool = False) -> list[list[int]]:
    """Return parameters of each task: 1, 4, 16 and 64 tasks of LoRA ranks 8 to 64 on all linears of an 8B backbone."""
    if is_small:
        return [[100, 300]]
    rank_8 = 20_971_520
    mixed = [rank_8 * 2**i for i in (0, 1, 2, 3)]
    return [[rank_8 * 2], mixed, [rank_8 * (1 + i % 4) for i in range(16)], [rank_8 // 2] * 64]


def measured(task_sizes: list[int], launcher: Launcher, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return times of one step of all tasks. Raises AssertionError if a parameter then differs from torch's."""
    groups = [
        AdamWGroup(i, *(torch.rand(size, device=device) for _ in range(4)), step=5, learning_rate=1e-4, max_norm=1.0)
        for i, size in enumerate(task_sizes)
    ]
    norms = torch.stack([torch.linalg.vector_norm(group.gradients_P) for group in groups])
    is_finite = torch.ones(len(task_sizes), dtype=torch.int32, device=device)
    parameters = [nn.Parameter(group.parameters_P.clone()) for group in groups]
    optimizers = [torch.optim.AdamW([p], lr=1e-4, weight_decay=0.0, fused=device.type == "cuda") for p in parameters]
    for parameter, optimizer, group in zip(parameters, optimizers, groups, strict=True):
        parameter.grad = group.gradients_P.clone()
        moments = {"exp_avg": group.first_moments_P.clone(), "exp_avg_sq": group.second_moments_P.clone()}
        step = torch.tensor(4.0, device=device if device.type == "cuda" else "cpu")
        optimizer.state[parameter] = {"step": step, **moments}

    def ours() -> None:
        multi_adamw.launch_multi_adamw(launcher, groups, norms, is_finite)

    def by_torch() -> None:
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            nn.utils.clip_grads_with_norm_([parameter], 1.0, norms[0])
            optimizer.step()

    ours()
    for parameter, optimizer, norm in zip(parameters, optimizers, norms, strict=True):
        nn.utils.clip_grads_with_norm_([parameter], 1.0, norm)
        optimizer.step()
    pairs = zip(groups, parameters, strict=True)
    error = max(float((group.parameters_P - p.detach()).abs().max()) for group, p in pairs)
    assert error < 1e-6, (task_sizes, error)
    return {
        "point": "clip, AdamW",
        "parameters": sum(task_sizes),
        "tasks": len(task_sizes),
        "bytes": 32 * sum(task_sizes),
        "flop": 15 * sum(task_sizes),
        "errors": {"ours": error},
        "times": timed({"ours": [ours], "torch": [by_torch]}, rounds, device),
    }
