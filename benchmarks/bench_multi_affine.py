"""Times multi_affine against torch, a task at a time, and a plain copy of the stream: forward and all gradients."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_timing import relative_error, timed
from engine.kernels.launch import Launcher
from engine.kernels.multi_affine_device import AffineRows, backward, forward


@dataclass(frozen=True)
class Point:
    """A point: a stream [T, N] divided evenly among tasks, each with a gain and a shift."""

    num_tokens: int
    width: int
    num_tasks: int
    dtype: torch.dtype = torch.bfloat16


def points(is_small: bool = False) -> list[Point]:
    if is_small:
        return [Point(70, 24, 3)]
    return [Point(t, n, tasks) for t, n in ((4096, 4096), (16384, 4096), (16384, 14336)) for tasks in (1, 4, 16, 64)]


class Tensors:
    def __init__(self, point: Point, device: torch.device) -> None:
        bounds = [point.num_tokens * i // point.num_tasks for i in range(point.num_tasks + 1)]
        self.pairs = list(itertools.pairwise(bounds))
        size = (point.num_tokens, point.width)
        self.x, self.dy = (torch.randn(size, device=device).to(point.dtype) for _ in range(2))
        self.y, self.dx = torch.empty_like(self.x), torch.empty_like(self.x)
        self.vectors = [torch.randn(point.width, device=device) for _ in range(2 * point.num_tasks)]
        self.gradients = torch.empty(len(self.vectors) * point.width, device=device)
        flat = [bound for pair in self.pairs for bound in pair]
        self.rows = AffineRows(flat, [3] * point.num_tasks, self.vectors, [True] * len(self.vectors))


def ours(t: Tensors, launcher: Launcher) -> tuple[Tensor, Tensor, Tensor]:
    forward(launcher, t.rows, t.x, t.y)
    backward(launcher, t.rows, t.x, t.dy, t.dx, t.gradients)
    return t.y, t.dx, t.gradients


def by_torch(t: Tensors, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run torch with vectors in the stream's type, as an adapter alone would; or all in `dtype`."""
    ys, dxs, gradients = [], [], []
    for i, (start, end) in enumerate(t.pairs):
        x, dy, gain, shift = (
            v.to(dtype or t.x.dtype) for v in (t.x[start:end], t.dy[start:end], t.vectors[2 * i], t.vectors[2 * i + 1])
        )
        ys.append(x * gain + shift)
        dxs.append(dy * gain)
        gradients += [(dy * x).sum(0), dy.sum(0)]
    return torch.cat(ys), torch.cat(dxs), torch.cat(gradients)


def measured(point: Point, launcher: Launcher, device: torch.device, rounds: int, num_sets: int) -> dict[str, Any]:
    """Return errors and times. Raises AssertionError if an error is more than rounding."""
    sets = [Tensors(point, device) for _ in range(num_sets)]
    reference = by_torch(sets[0], torch.float64)
    errors = {
        name: max(relative_error(a, b) for a, b in zip(results, reference, strict=True))
        for name, results in (("ours", ours(sets[0], launcher)), ("torch", by_torch(sets[0])))
    }
    assert errors["ours"] < 1e-2, (point, errors)
    runs = {
        "ours": [lambda t=t: ours(t, launcher) for t in sets],
        "torch": [lambda t=t: by_torch(t) for t in sets],
        "copy": [lambda t=t: t.x.clone() for t in sets],
    }
    elements = point.num_tokens * point.width
    return {
        "point": f"factors and offsets of {point.width}",
        "tokens": point.num_tokens,
        "tasks": point.num_tasks,
        "bytes": 5 * elements * point.dtype.itemsize,  # X, Y; dY, X, dX
        "flop": 6 * elements,
        "errors": errors,
        "times": timed(runs, rounds, device),
    }
