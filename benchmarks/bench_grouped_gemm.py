"""Times grouped_gemm against torch, a task at a time: bottleneck adapters' down product, forward and gradients."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_timing import relative_error, timed
from engine.kernels.grouped_gemm_device import MatrixProduct, launch_products
from engine.kernels.launch import Launcher


@dataclass(frozen=True)
class Point:
    """A point: T tokens divided evenly among tasks with bottlenecks of these sizes in turn."""

    num_tokens: int
    width: int
    num_tasks: int
    sizes: tuple[int, ...] = (8, 16, 32, 64)
    dtype: torch.dtype = torch.bfloat16

    @property
    def task_sizes(self) -> list[int]:
        return [self.sizes[i % len(self.sizes)] for i in range(self.num_tasks)]


def points(is_small: bool = False) -> list[Point]:
    if is_small:
        return [Point(70, 24, 3, (4, 9))]
    return [Point(tokens, 4096, tasks) for tokens in (4096, 16384) for tasks in (1, 4, 16, 64)]


class Tensors:
    """Tensors of each task: X and dX [L, K], S and dS [L, S], W [S, K], its gradient and the bias's."""

    def __init__(self, point: Point, device: torch.device) -> None:
        bounds = [point.num_tokens * i // point.num_tasks for i in range(point.num_tasks + 1)]
        lengths = [end - start for start, end in itertools.pairwise(bounds)]

        def draw(*size: int, dtype: torch.dtype = point.dtype) -> Tensor:
            return torch.randn(size, device=device).to(dtype)

        self.x = [draw(length, point.width) for length in lengths]
        self.ds = [draw(length, size) for length, size in zip(lengths, point.task_sizes, strict=True)]
        self.w = [draw(size, point.width, dtype=torch.float32) / point.width**0.5 for size in point.task_sizes]
        self.bias = [draw(size, dtype=torch.float32) for size in point.task_sizes]
        self.dx, self.s, self.dw = ([torch.empty_like(t) for t in tensors] for tensors in (self.x, self.ds, self.w))
        self.db = [torch.empty(1, size, device=device) for size in point.task_sizes]
        self.ones = torch.ones(1, max(lengths), device=device, dtype=point.dtype)


def ours(t: Tensors, launcher: Launcher) -> list[list[Tensor]]:
    each = list(zip(t.x, t.w, t.s, t.bias, t.ds, t.dx, t.dw, t.db, strict=True))
    launch_products(launcher, [MatrixProduct(x, w.T, s, 1.0, bias) for x, w, s, bias, *_ in each])
    launch_products(launcher, [MatrixProduct(ds, w, dx, 1.0) for _, w, _, _, ds, dx, *_ in each])
    sums = [MatrixProduct(t.ones[:, : len(ds)], ds, db, 1.0) for _, _, _, _, ds, _, _, db in each]
    launch_products(launcher, [*(MatrixProduct(ds.T, x, dw, 1.0) for x, _, _, _, ds, _, dw, _ in each), *sums])
    return [t.s, t.dx, t.dw, [db[0] for db in t.db]]


def by_torch(t: Tensors, of: Callable[[Tensor], Tensor] | None = None) -> list[list[Tensor]]:
    """Run torch in the stream's type, or in the type to which `of` converts everything."""
    results: list[list[Tensor]] = [[], [], [], []]
    for x, ds, w, bias in zip(t.x, t.ds, t.w, t.bias, strict=True):
        x, ds, w, bias = (of(v) if of else v.to(x.dtype) for v in (x, ds, w, bias))
        for outputs, output in zip(results, (torch.addmm(bias, x, w.T), ds @ w, ds.T @ x, ds.sum(0)), strict=True):
            outputs.append(output)
    return results


def measured(point: Point, launcher: Launcher, device: torch.device, rounds: int, num_sets: int) -> dict[str, Any]:
    """Return errors and times. Raises AssertionError if an error is more than rounding."""
    sets = [Tensors(point, device) for _ in range(num_sets)]
    reference = by_torch(sets[0], Tensor.double)
    right = [tensor for tensors in reference for tensor in tensors]
    errors = {
        name: max(relative_error(a, b) for a, b in zip(itertools.chain(*results), right, strict=True))
        for name, results in (("ours", ours(sets[0], launcher)), ("torch", by_torch(sets[0])))
    }
    assert errors["ours"] < 2e-2, (point, errors)
    runs = {
        "ours": [lambda t=t: ours(t, launcher) for t in sets],
        "torch": [lambda t=t: by_torch(t) for t in sets],
    }
    streams = 3 * point.num_tokens * point.width * point.dtype.itemsize  # X twice, dX
    factors = 3 * 4 * sum(point.task_sizes) * point.width
    per_token = sum(point.task_sizes) / point.num_tasks
    return {
        "point": f"bottlenecks of {point.width}",
        "tokens": point.num_tokens,
        "tasks": point.num_tasks,
        "bytes": int(streams + factors + 3 * point.num_tokens * per_token * point.dtype.itemsize),
        "flop": int(6 * point.num_tokens * per_token * point.width),
        "errors": errors,
        "times": timed(runs, rounds, device),
    }
