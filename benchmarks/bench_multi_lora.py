"""multi_lora against the frozen operator, cuBLAS with a block-diagonal S, and HF PEFT's LoRA linear.

Forward and backward. All get equal inputs and are checked against float64 before they are timed. `cublas` does all
tasks' low-rank products in dense products of the whole stream, S masked to its own task's ranks; `peft` runs a LoRA
linear of HF PEFT on each task's tokens; `frozen` is the base operator alone: (ms / frozen - 1) is what adapters add.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_timing import timed
from benchmarks.lorafusion import LoraFusion, NotDoneError
from engine.kernels.launch import Launcher
from engine.kernels.multi_lora import LoraUse, LowRank
from engine.kernels.multi_lora_device import LowRankProducts, Wanted, describe

LAYER = {  # the linear operators of one Llama-3-8B layer
    "q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
    "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096),
}  # fmt: skip
OPERATORS = {"4096x4096": (4096, 4096), "4096x11008": (4096, 11008), "11008x4096": (11008, 4096)}
SCALE = 0.5
TOLERANCE = 2e-2  # of the norm of a result in bf16


@dataclass(frozen=True)
class Point:
    """`operators` (K, N) on T tokens, cut evenly among tasks of these ranks in turn."""

    name: str
    operators: tuple[tuple[int, int], ...]
    num_tokens: int
    num_tasks: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def task_ranks(self) -> list[int]:
        return [self.ranks[i % len(self.ranks)] for i in range(self.num_tasks)]

    def extra_bytes(self) -> int:
        """The fewest: X once forward, dY once, X once for dA; factors read and their gradients written."""
        size, ranks = self.dtype.itemsize, sum(self.task_ranks)
        streams = sum(self.num_tokens * (2 * k + n) * size for k, n in self.operators)
        return streams + sum(ranks * (k + n) * 4 * 3 for k, n in self.operators)

    def extra_flop(self) -> int:
        """Six products of [L, R] with [R, K or N]."""
        per_token = sum(self.task_ranks) / self.num_tasks
        return int(sum(6 * self.num_tokens * per_token * (k + n) for k, n in self.operators))


def points(is_small: bool = False) -> list[Point]:
    """What issue 4 asks for; small: one that a CPU can do, to try the script."""
    if is_small:
        return [Point("32x24", ((32, 24),), 70, 3, (4, 8, 2))]
    mixed, found = (8, 16, 32, 64), []
    for tokens in (4096, 16384):
        for tasks in (1, 4, 16, 64):
            found += [Point(name, (shape,), tokens, tasks, mixed) for name, shape in OPERATORS.items()]
        layer = tuple(LAYER.values())
        found += [Point("llama-3-8b layer", layer, tokens, tasks, mixed) for tasks in (1, 4, 16, 64)]
        found.append(Point("llama-3-8b layer", layer, tokens, 16, (16,)))  # the goal's
    return found


@dataclass
class Inputs:
    """One operator's tensors, drawn anew for each set."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    uses: list[LoraUse]
    factors: list[LowRank]
    rows: Any = field(init=False)
    runs: Any = field(init=False)

    def __post_init__(self) -> None:
        self.rows, self.runs = describe(self.uses, self.factors)

    @classmethod
    def drawn(cls, point: Point, k: int, n: int, device: torch.device) -> "Inputs":
        def draw(*size: int, dtype: torch.dtype = point.dtype) -> Tensor:
            return torch.randn(size, device=device).mul_(size[-1] ** -0.5).to(dtype)

        bounds = [point.num_tokens * i // point.num_tasks for i in range(point.num_tasks + 1)]
        uses = [LoraUse(start, end, SCALE) for start, end in itertools.pairwise(bounds)]
        factors = [LowRank(draw(r, k, dtype=torch.float32), draw(n, r, dtype=torch.float32)) for r in point.task_ranks]
        x, dy = (torch.randn(point.num_tokens, w, device=device, dtype=point.dtype) for w in (k, n))
        return cls(x, draw(k, n), dy, uses, factors)


Result = tuple[Tensor, Tensor, list[Tensor]]  # Y, dX, gradients of A and B in turn


def frozen(given: Inputs) -> tuple[Tensor, Tensor]:
    return given.x @ given.weight, given.dy @ given.weight.T


def ours(given: Inputs, launcher: Launcher) -> Result:
    y, dx = frozen(given)
    products = LowRankProducts(launcher, given.rows, given.runs, given.factors, given.x.dtype)
    shrunk = products.forward(given.x, y)
    flat = products.backward(given.x, given.dy, shrunk, dx, [Wanted(True, True, False, False)] * len(given.uses))
    sizes = [factor.numel() for low_rank in given.factors for factor in low_rank[:2]]
    shapes = [factor.shape for low_rank in given.factors for factor in low_rank[:2]]
    return y, dx, [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


class BlockDiagonal:
    """cuBLAS alone: every task's factors side by side, S masked. What is made once a step is made here."""

    def __init__(self, given: Inputs) -> None:
        dtype, ranks = given.x.dtype, [len(low_rank.a_RK) for low_rank in given.factors]
        self.a = torch.cat([low_rank.a_RK for low_rank in given.factors]).to(dtype)
        self.b = torch.cat([low_rank.b_NR for low_rank in given.factors], dim=1).to(dtype)
        self.mask = given.x.new_zeros(len(given.x), sum(ranks))
        self.ranks, first = ranks, 0
        for use, rank in zip(given.uses, ranks, strict=True):
            self.mask[use.start : use.end, first : first + rank] = use.scale
            first += rank

    def __call__(self, given: Inputs) -> Result:
        y, dx = frozen(given)
        s = (given.x @ self.a.T).mul_(self.mask)
        y.addmm_(s, self.b.T)
        e = (given.dy @ self.b).mul_(self.mask)
        db, da = given.dy.T @ s, e.T @ given.x
        dx.addmm_(e, self.a)
        das, dbs = da.split(self.ranks), db.split(self.ranks, dim=1)
        return y, dx, [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]


class Peft:
    """A LoRA linear of HF PEFT for each task, on its own tokens, sharing the base weight."""

    def __init__(self, given: Inputs) -> None:
        from peft.tuners.lora import LoraConfig
        from peft.tuners.lora.layer import Linear

        k, n = given.weight.shape
        base = nn.Linear(k, n, bias=False, device="meta")
        base.weight = nn.Parameter(given.weight.T, requires_grad=False)
        self.layers = []
        for use, low_rank in zip(given.uses, given.factors, strict=True):
            rank = len(low_rank.a_RK)
            layer = Linear(
                base, "task", LoraConfig(r=rank, lora_alpha=use.scale * rank), r=rank, lora_alpha=use.scale * rank
            )
            layer.lora_A["task"].weight = nn.Parameter(low_rank.a_RK.to(given.x.dtype))
            layer.lora_B["task"].weight = nn.Parameter(low_rank.b_NR.to(given.x.dtype))
            self.layers.append(layer)

    def __call__(self, given: Inputs) -> Result:
        ys, dxs, gradients = [], [], []
        for use, layer in zip(given.uses, self.layers, strict=True):
            x = given.x[use.start : use.end].detach().requires_grad_()
            y = layer(x)
            leaves = [x, layer.lora_A["task"].weight, layer.lora_B["task"].weight]
            dx, *own = torch.autograd.grad(y, leaves, given.dy[use.start : use.end])
            ys.append(y.detach())
            dxs.append(dx)
            gradients += own
        return torch.cat(ys), torch.cat(dxs), gradients


def expected(given: Inputs) -> Result:
    """In float64."""
    x, weight, dy = given.x.double(), given.weight.double(), given.dy.double()
    y, dx, gradients = x @ weight, dy @ weight.T, []
    for use, low_rank in zip(given.uses, given.factors, strict=True):
        part, a, b = slice(use.start, use.end), low_rank.a_RK.double(), low_rank.b_NR.double()
        s, e = x[part] @ a.T, use.scale * (dy[part] @ b)
        y[part] += use.scale * (s @ b.T)
        dx[part] += e @ a
        gradients += [e.T @ x[part], use.scale * (dy[part].T @ s)]
    return y, dx, gradients


def errors(found: Result, reference: Result) -> dict[str, float]:
    """||found - reference|| / ||reference|| of Y, dX and, at worst, of a factor's gradient."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    worst = max(relative(a, b) for a, b in zip(found[2], reference[2], strict=True))
    return {"y": relative(found[0], reference[0]), "dx": relative(found[1], reference[1]), "factors": worst}


Contender = Callable[[Inputs], Callable[[Inputs], Result]]  # from inputs, what is timed on them


def beside(peer: LoraFusion) -> Contender:
    """A peer as a contender."""

    def made(given: Inputs) -> Callable[[Inputs], Result]:
        run = peer.operator(given.x, given.weight, given.uses, given.factors)
        return lambda own: run(own.x, own.dy)

    return made


def measured(
    point: Point,
    launcher: Launcher,
    device: torch.device,
    rounds: int,
    num_sets: int,
    peers: Mapping[str, Contender] | None = None,
) -> dict[str, Any]:
    """Errors and times of one point. A peer that raises NotDoneError is left out, with its reason.

    Raises AssertionError where an error of ours is no rounding; a peer's wrong results are told, and not timed.
    """
    sets = [[Inputs.drawn(point, k, n, device) for k, n in point.operators] for _ in range(num_sets)]
    contenders: dict[str, Sequence[Callable[[Inputs], Any]]] = {
        "frozen": [frozen] * len(point.operators),
        "ours": [lambda given: ours(given, launcher)] * len(point.operators),
    }
    runs: dict[str, list[Callable[[], object]]] = {
        name: [lambda own=own, many=many: [f(g) for f, g in zip(many, own, strict=True)] for own in sets]
        for name, many in contenders.items()
    }
    left_out: dict[str, str] = {}
    reference, wrong = expected(sets[0][0]), {"ours": errors(runs["ours"][0]()[0], expected(sets[0][0]))}  # type: ignore[index]
    for name, kind in {"cublas": BlockDiagonal, "peft": Peft, **(peers or {})}.items():
        try:
            made = [[kind(given) for given in own] for own in sets]
            wrong[name] = errors(made[0][0](sets[0][0]), reference)
        except NotDoneError as error:
            left_out[name] = str(error)
            continue
        if not all(value < TOLERANCE for value in wrong[name].values()):
            left_out[name] = f"wrong results: {wrong[name]}"
            continue
        runs[name] = [
            lambda own=own, many=many: [f(g) for f, g in zip(many, own, strict=True)]
            for own, many in zip(sets, made, strict=True)
        ]
    assert all(value < TOLERANCE for value in wrong["ours"].values()), (point, wrong)
    return {
        "point": point.name,
        "tokens": point.num_tokens,
        "tasks": point.num_tasks,
        "ranks": sorted(set(point.task_ranks)),
        "errors": wrong,
        "extra_bytes": point.extra_bytes(),
        "extra_flop": point.extra_flop(),
        "left_out": left_out,
        "times": timed(runs, rounds, device),
    }
