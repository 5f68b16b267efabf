"""Times segment_cross_entropy against torch's cross_entropy on float32 logits and its backward."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_timing import timed
from engine.kernels.launch import Launcher
from engine.kernels.segment_cross_entropy import logits_gradient_


def shapes(is_small: bool = False) -> list[tuple[int, int]]:
    """A point: rows of a chunk, and vocabulary."""
    return [(5, 70)] if is_small else [(128, 128256), (512, 32000), (1024, 49152)]


def measured(rows: int, vocabulary: int, launcher: Launcher, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure losses and gradient from bf16 logits; each call gets a fresh copy, which is timed separately."""
    sets = [torch.randn(rows, vocabulary, device=device).bfloat16() for _ in range(4)]
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    weights = torch.full((rows,), 1 / rows, device=device)

    def ours(z: Tensor) -> Tensor:
        logits = z.clone()
        logits_gradient_(launcher, logits, targets, weights, None)
        return logits

    def by_torch(z: Tensor) -> Tensor:
        leaf = z.float().requires_grad_()
        (nn.functional.cross_entropy(leaf, targets, reduction="none") * weights).sum().backward()
        assert leaf.grad is not None
        return leaf.grad.bfloat16()

    error = float((ours(sets[0]).double() - by_torch(sets[0]).double()).norm() / by_torch(sets[0]).double().norm())
    assert error < 1e-2, error
    variants = {
        name: [lambda z=z, f=f: f(z) for z in sets]
        for name, f in (("ours", ours), ("torch", by_torch), ("copy", Tensor.clone))
    }
    num_bytes = 3 * 2 * rows * vocabulary
    return {
        "point": f"{rows} rows of {vocabulary}",
        "bytes": num_bytes,
        "flop": 8 * rows * vocabulary,
        "errors": {"ours": error},
        "times": timed(variants, rounds, device),
    }
