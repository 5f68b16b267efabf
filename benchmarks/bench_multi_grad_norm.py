"""Times multi_grad_norm against torch's norm of each task's gradient in turn."""

from typing import Any

import torch

from benchmarks.bench_multi_adamw import sizes
from benchmarks.kernel_timing import timed
from engine.kernels import multi_grad_norm
from engine.kernels.launch import Launcher

__all__ = ["measured", "sizes"]


def measured(own: list[int], launcher: Launcher, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return times of all tasks' norms. Raises AssertionError if one differs from float64's."""
    gradients = [torch.randn(size, device=device) for size in own]
    expected = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
    norms, _ = multi_grad_norm.launch_multi_grad_norm(launcher, gradients)
    error = float((norms.double() / expected - 1).abs().max())
    assert error < 1e-6, (own, error)
    runs = {
        "ours": [lambda: multi_grad_norm.launch_multi_grad_norm(launcher, gradients)],
        "torch": [lambda: [torch.linalg.vector_norm(g) for g in gradients]],
    }
    return {
        "point": "gradient norms",
        "parameters": sum(own),
        "tasks": len(own),
        "bytes": 4 * sum(own),
        "flop": 2 * sum(own),
        "errors": {"ours": error},
        "times": timed(runs, rounds, device),
    }
