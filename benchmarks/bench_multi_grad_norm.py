"""Times multi_grad_norm against torch's norm of each task's gradient in turn."""

from typing import Any

import torch

from benchmarks.bench_multi_adamw import sizes
from benchmarks.kernel_timing import timed
from engine.kernels import multi_grad_norm
from engine.kernels.launch import Launcher

__all__ = ["measured", "sizes"]


def measured(task_sizes: list[int], launcher: Launcher, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return times of all tasks' norms. Raises AssertionError if one differs from float64's."""
    gradients = [torch.randn(size, device=device) for size in task_sizes]
    expected = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
    norms, _ = multi_grad_norm.launch_multi_grad_norm(launcher, gradients)
    error = float((norms.double() / expected - 1).abs().max())
    assert error < 1e-6, (task_sizes, error)
    runs = {
        "ours": [lambda: multi_grad_norm.launch_multi_grad_norm(launcher, gradients)],
        "torch": [lambda: [torch.linalg.vector_norm(g) for g in gradients]],
    }
    return {
        "point": "gradient norms",
        "parameters": sum(task_sizes),
        "tasks": len(task_sizes),
        "bytes": 4 * sum(task_sizes),
        "flop": 2 * sum(task_sizes),
        "errors": {"ours": error},
        "times": timed(runs, rounds, device),
    }
