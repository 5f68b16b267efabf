"""Times multi_lora against the frozen operators, cuBLAS with a block-diagonal S, grouped_mm, and HF PEFT's linear.

Forward and backward, for groups of operators that read the same X. All get equal inputs and are checked against float64
before they are timed. `first` writes the low-rank products of Y before the base product, which accumulates onto them;
`after` adds them to its result; `ours` is the choice of `accumulates_into_base_gemm`. `cublas` computes all tasks'
low-rank products as dense products of the whole stream, with S masked to each task's ranks; `grouped_mm` as six calls
of torch's grouped product; `peft` runs a LoRA linear of HF PEFT on each task's tokens; `frozen` is the base operators
alone: (ms / frozen - 1) is what adapters add.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_timing import timed
from benchmarks.lorafusion import LoraFusion, NotDoneError
from engine.kernels.launch import CachingUploader, DeviceTable, Launcher
from engine.kernels.multi_lora.descriptors import describe_factors, describe_uses, group_uses
from engine.kernels.multi_lora.device_products import GroupProducts, accumulates_into_base_gemm, add_addresses
from engine.kernels.multi_lora.launch_plan import LaunchPlan
from engine.kernels.multi_lora.types import AdapterSlice, LowRank, Operator

Widths = tuple[int, tuple[int, ...]]  # K, and N of each operator of a group
LAYER: tuple[Widths, ...] = (  # of Llama-3-8B: q, k, v; o; gate, up; down
    (4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)),
)  # fmt: skip
GROUPS: dict[str, Widths] = {
    "4096x4096": (4096, (4096,)), "4096x11008": (4096, (11008,)), "11008x4096": (11008, (4096,)),
    "q, k, v": LAYER[0], "gate, up": LAYER[2],
}  # fmt: skip
SCALE = 0.5
TOLERANCE = 2e-2  # of the norm of a result in bf16


@dataclass(frozen=True)
class Point:
    """A point: `groups` on T tokens, divided evenly among tasks of these ranks in turn."""

    name: str
    groups: tuple[Widths, ...]
    num_tokens: int
    num_tasks: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def task_ranks(self) -> list[int]:
        return [self.ranks[i % len(self.ranks)] for i in range(self.num_tasks)]

    def extra_bytes(self) -> int:
        """Return the fewest bytes: X once forward, dY once, X once for dA; factors read and their gradients written."""
        size, ranks = self.dtype.itemsize, sum(self.task_ranks)
        streams = sum(self.num_tokens * (2 * k + sum(ns)) * size for k, ns in self.groups)
        return streams + sum(ranks * (k + n) * 4 * 3 for k, ns in self.groups for n in ns)

    def extra_flop(self) -> int:
        """Return the FLOPs of six products of [L, R] with [R, K or N]."""
        per_token = sum(self.task_ranks) / self.num_tasks
        return int(sum(6 * self.num_tokens * per_token * (k + n) for k, ns in self.groups for n in ns))


def points(is_small: bool = False) -> list[Point]:
    """Return all points; `small`: one that a CPU can run, to try the script."""
    if is_small:
        return [Point("32x24, 8", ((32, (24, 8)),), 70, 3, (4, 8, 2))]
    mixed, all_points = (8, 16, 32, 64), []
    for tokens in (4096, 16384):
        for tasks in (1, 4, 16, 64):
            all_points += [Point(name, (group,), tokens, tasks, mixed) for name, group in GROUPS.items()]
        all_points += [Point("llama-3-8b layer", LAYER, tokens, tasks, mixed) for tasks in (1, 4, 16, 64)]
        all_points.append(Point("llama-3-8b layer", LAYER, tokens, 16, (16,)))  # the goal's
    return all_points


@dataclass
class Inputs:
    """The tensors of one group, drawn anew for each set, with the tables computed once per plan."""

    x: Tensor
    operators: list[Operator]
    dys: list[Tensor]
    plan: LaunchPlan = field(init=False)
    table: DeviceTable = field(init=False)

    def __post_init__(self) -> None:
        pairs, rows = group_uses(self.operators), describe_factors(group_uses(self.operators))
        widths = (self.x.shape[1], *(dy.shape[1] for dy in self.dys))
        uses = describe_uses(pairs, widths[0], widths[1:])
        tables = CachingUploader(self.x.device)
        self.plan = LaunchPlan(uses, rows, len(self.x), widths, self.x.dtype, tables)
        self.table = tables.upload(add_addresses(rows, self.factors, []))

    @property
    def factors(self) -> list[Tensor]:
        return [factor for operator in self.operators for low_rank in operator.factors for factor in low_rank[:2]]

    @classmethod
    def drawn(cls, point: Point, group: Widths, device: torch.device) -> "Inputs":
        def draw(*size: int, dtype: torch.dtype = point.dtype) -> Tensor:
            return torch.randn(size, device=device).mul_(size[-1] ** -0.5).to(dtype)

        def factor(*size: int) -> Tensor:
            return draw(*size, dtype=torch.float32).requires_grad_()

        bounds = [point.num_tokens * i // point.num_tasks for i in range(point.num_tasks + 1)]
        uses = [AdapterSlice(start, end, SCALE) for start, end in itertools.pairwise(bounds)]
        k, widths = group
        operators = [
            Operator(draw(k, n), None, uses, [LowRank(factor(r, k), factor(n, r)) for r in point.task_ranks])
            for n in widths
        ]
        x, *dys = (torch.randn(point.num_tokens, w, device=device, dtype=point.dtype) for w in (k, *widths))
        return cls(x, operators, dys)


Result = tuple[list[Tensor], Tensor, list[Tensor]]  # Y of each operator, dX, gradients of A and B in turn


def frozen(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    dx = inputs.dys[-1] @ inputs.operators[-1].weight_KN.T
    for operator, dy in zip(inputs.operators[:-1], inputs.dys, strict=False):
        dx.addmm_(dy, operator.weight_KN.T)
    return [inputs.x @ operator.weight_KN for operator in inputs.operators], dx


def ours(inputs: Inputs, launcher: Launcher, first: bool | None = None) -> Result:
    """Run our kernels. `first`: write Y's low-rank products before the base product; None: as
    `accumulates_into_base_gemm` chooses."""
    products = GroupProducts(launcher, inputs.plan, inputs.table, inputs.factors, inputs.x.dtype)
    weights = [operator.weight_KN for operator in inputs.operators]
    shrunk = products.shrink(inputs.x)
    if accumulates_into_base_gemm(inputs.x.shape[1], False) if first is None else first:
        ys = [dy.new_empty(dy.shape) for dy in inputs.dys]
        products.write(ys, [None] * len(ys), shrunk)
        for y, weight in zip(ys, weights, strict=True):
            y.addmm_(inputs.x, weight)
    else:
        ys = [inputs.x @ weight for weight in weights]
        products.add(ys, shrunk)
    dx = torch.empty_like(inputs.x)
    flat = products.backward(inputs.x, inputs.dys, shrunk, dx)
    for dy, weight in zip(inputs.dys, weights, strict=True):
        dx.addmm_(dy, weight.T)
    sizes = [factor.numel() for factor in inputs.factors]
    return ys, dx, [p.view(f.shape) for p, f in zip(flat.split(sizes), inputs.factors, strict=True)]


class BlockDiagonal:
    """Run cuBLAS alone: all tasks' factors side by side, S masked. `__init__` is not timed: it runs once per step."""

    def __init__(self, inputs: Inputs) -> None:
        self.each = [self._beside(operator, inputs.x) for operator in inputs.operators]

    @staticmethod
    def _beside(operator: Operator, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        ranks, first = [len(low_rank.a_RK) for low_rank in operator.factors], 0
        a = torch.cat([low_rank.a_RK for low_rank in operator.factors]).to(x.dtype)
        b = torch.cat([low_rank.b_NR for low_rank in operator.factors], dim=1).to(x.dtype)
        mask = x.new_zeros(len(x), sum(ranks))
        for use, rank in zip(operator.uses, ranks, strict=True):
            mask[use.start : use.end, first : first + rank] = use.scale
            first += rank
        return a.detach(), b.detach(), mask, ranks

    def __call__(self, inputs: Inputs) -> Result:
        ys, dx = frozen(inputs)
        gradients: list[Tensor] = []
        for y, dy, (a, b, mask, ranks) in zip(ys, inputs.dys, self.each, strict=True):
            s = (inputs.x @ a.T).mul_(mask)
            y.addmm_(s, b.T)
            e = (dy @ b).mul_(mask)
            db, da = dy.T @ s, e.T @ inputs.x
            dx.addmm_(e, a)
            pairs = zip(da.split(ranks), db.split(ranks, dim=1), strict=True)
            gradients += [gradient for pair in pairs for gradient in pair]
        return ys, dx, gradients


class GroupedMm:
    """Run torch's grouped_mm: six calls an operator, ranks padded to the largest, a group for each task.

    `__init__` is not timed: factors are padded once a step. All operators are used by the same tasks on all tokens.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.each = [self._padded(operator, inputs.x.dtype) for operator in inputs.operators]
        uses = inputs.operators[0].uses
        self.ends_G = torch.tensor([use.end for use in uses], dtype=torch.int32, device=inputs.x.device)
        self.scale = uses[0].scale
        assert {use.scale for operator in inputs.operators for use in operator.uses} == {self.scale}

    @staticmethod
    def _padded(operator: Operator, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]]:
        """Return A [G, R, K] and B [G, N, R] with zeros beyond a task's rank, and the ranks."""
        ranks = [len(low_rank.a_RK) for low_rank in operator.factors]
        size = -(-max(ranks) // 8) * 8  # rows of 16 bytes
        (k, n), weight = operator.weight_KN.shape, operator.weight_KN
        a_GRK, b_GNR = (weight.new_zeros(len(ranks), *shape) for shape in ((size, k), (n, size)))
        for a_RK, b_NR, rank, low_rank in zip(a_GRK, b_GNR, ranks, operator.factors, strict=True):
            a_RK[:rank], b_NR[:, :rank] = low_rank.a_RK.detach().to(dtype), low_rank.b_NR.detach().to(dtype)
        return a_GRK, b_GNR, ranks

    def __call__(self, inputs: Inputs) -> Result:
        grouped_mm, ends_G = torch.nn.functional.grouped_mm, self.ends_G
        ys, dx = frozen(inputs)
        gradients: list[Tensor] = []
        for y, dy, (a_GRK, b_GNR, ranks) in zip(ys, inputs.dys, self.each, strict=True):
            s_TR = grouped_mm(inputs.x, a_GRK.transpose(1, 2), offs=ends_G).mul_(self.scale)
            y.add_(grouped_mm(s_TR, b_GNR.transpose(1, 2), offs=ends_G))
            e_TR = grouped_mm(dy, b_GNR, offs=ends_G).mul_(self.scale)
            db_GNR = grouped_mm(dy.T, s_TR, offs=ends_G)
            da_GRK = grouped_mm(e_TR.T, inputs.x, offs=ends_G)
            dx.add_(grouped_mm(e_TR, a_GRK, offs=ends_G))
            for da_RK, db_NR, rank in zip(da_GRK, db_GNR, ranks, strict=True):
                gradients += [da_RK[:rank], db_NR[:, :rank]]
        return ys, dx, gradients


class Peft:
    """Run a LoRA linear of HF PEFT for each operator and task, on its own tokens, sharing the base weight."""

    def __init__(self, inputs: Inputs) -> None:
        from peft.tuners.lora import LoraConfig
        from peft.tuners.lora.layer import Linear

        self.layers: list[list[nn.Module]] = []
        for operator in inputs.operators:
            k, n = operator.weight_KN.shape
            base = nn.Linear(k, n, bias=False, device="meta")
            base.weight = nn.Parameter(operator.weight_KN.T, requires_grad=False)
            layers = []
            for use, low_rank in zip(operator.uses, operator.factors, strict=True):
                rank = len(low_rank.a_RK)
                config = LoraConfig(r=rank, lora_alpha=use.scale * rank)
                layer: Any = Linear(base, "task", config, r=rank, lora_alpha=use.scale * rank)
                layer.lora_A["task"].weight = nn.Parameter(low_rank.a_RK.to(inputs.x.dtype))
                layer.lora_B["task"].weight = nn.Parameter(low_rank.b_NR.to(inputs.x.dtype))
                layers.append(layer)
            self.layers.append(layers)

    def __call__(self, inputs: Inputs) -> Result:
        ys, dx = [], torch.zeros_like(inputs.x)
        gradients: list[Tensor] = []
        for operator, dy, layers in zip(inputs.operators, inputs.dys, self.layers, strict=True):
            parts = []
            for use, layer in zip(operator.uses, layers, strict=True):
                x = inputs.x[use.start : use.end].detach().requires_grad_()
                y = layer(x)
                leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
                part, *factor_gradients = torch.autograd.grad(y, leaves, dy[use.start : use.end])
                parts.append(y.detach())
                dx[use.start : use.end] += part
                gradients += factor_gradients
            ys.append(torch.cat(parts))
        return ys, dx, gradients


def expected(inputs: Inputs) -> Result:
    """Compute the reference in float64."""
    x, ys, dx = inputs.x.double(), [], torch.zeros_like(inputs.x, dtype=torch.float64)
    gradients: list[Tensor] = []
    for operator, dy_TN in zip(inputs.operators, inputs.dys, strict=True):
        weight, dy = operator.weight_KN.double(), dy_TN.double()
        y = x @ weight
        dx += dy @ weight.T
        for use, low_rank in zip(operator.uses, operator.factors, strict=True):
            part, (a, b) = slice(use.start, use.end), (factor.detach().double() for factor in low_rank[:2])  # type: ignore[union-attr]
            s, e = x[part] @ a.T, use.scale * (dy[part] @ b)
            y[part] += use.scale * (s @ b.T)
            dx[part] += e @ a
            gradients += [e.T @ x[part], use.scale * (dy[part].T @ s)]
        ys.append(y)
    return ys, dx, gradients


def errors(result: Result, reference: Result) -> dict[str, float]:
    """Return the worst relative errors of Y, of a factor's gradient, and of dX."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    def worst(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
        return max(relative(a, b) for a, b in zip(some, others, strict=True))

    return {
        "y": worst(result[0], reference[0]),
        "dx": relative(result[1], reference[1]),
        "factors": worst(result[2], reference[2]),
    }


Contender = Callable[[Inputs], Callable[[Inputs], Result]]  # prepares a run for inputs; the run is timed


def beside(peer: LoraFusion) -> Contender:
    """Return a contender that runs the peer's operators one by one and adds up their dX."""

    def prepare(inputs: Inputs) -> Callable[[Inputs], Result]:
        runs = [peer.operator(inputs.x, o.weight_KN, o.uses, o.factors) for o in inputs.operators]

        def run(inputs: Inputs) -> Result:
            parts = [one(inputs.x, dy) for one, dy in zip(runs, inputs.dys, strict=True)]
            dx = sum((part for _, part, _ in parts[1:]), start=parts[0][1])
            return [y for y, _, _ in parts], dx, [gradient for *_, of in parts for gradient in of]

        return run

    return prepare


def measured(
    point: Point,
    launcher: Launcher,
    device: torch.device,
    rounds: int,
    num_sets: int,
    peers: Mapping[str, Contender] | None = None,
) -> dict[str, Any]:
    """Return errors and times of one point, and the faster way to add Y's low-rank products beside the chosen one.

    A peer that fails is left out, with its reason. A peer with wrong results is reported and not timed.
    Raises AssertionError if an error of ours is larger than rounding.
    """
    sets = [[Inputs.drawn(point, group, device) for group in point.groups] for _ in range(num_sets)]
    ours_by_variant: dict[str, Contender] = {
        "ours": lambda _: lambda inputs: ours(inputs, launcher),
        "first": lambda _: lambda inputs: ours(inputs, launcher, True),
        "after": lambda _: lambda inputs: ours(inputs, launcher, False),
    }
    runs: dict[str, list[Callable[[], object]]] = {"frozen": _calls([[frozen] * len(groups) for groups in sets], sets)}
    reference, errors_by_name, left_out = expected(sets[0][0]), dict[str, dict[str, float]](), dict[str, str]()
    others: dict[str, Contender] = {"cublas": BlockDiagonal, "grouped_mm": GroupedMm, "peft": Peft, **(peers or {})}
    for name, prepare in {**ours_by_variant, **others}.items():
        try:
            runs_of_sets = [[prepare(inputs) for inputs in groups] for groups in sets]
            errors_by_name[name] = errors(runs_of_sets[0][0](sets[0][0]), reference)
        except Exception as error:  # a peer's package may be missing, older, or unable to run these shapes
            if name in ours_by_variant:
                raise
            left_out[name] = str(error) if isinstance(error, NotDoneError) else f"{type(error).__name__}: {error}"
            continue
        is_right = all(value < TOLERANCE for value in errors_by_name[name].values())
        assert is_right or name not in ours_by_variant, (point, name, errors_by_name[name])
        if is_right:
            runs[name] = _calls(runs_of_sets, sets)
        else:
            left_out[name] = f"wrong results: {errors_by_name[name]}"
    times = timed(runs, rounds, device)
    return {
        "point": point.name,
        "tokens": point.num_tokens,
        "tasks": point.num_tasks,
        "ranks": sorted(set(point.task_ranks)),
        "errors": errors_by_name,
        "extra_bytes": point.extra_bytes(),
        "extra_flop": point.extra_flop(),
        "chosen": sorted({"first" if accumulates_into_base_gemm(k, False) else "after" for k, _ in point.groups}),
        "faster": min(("first", "after"), key=lambda name: times[name]["ms"]),
        "left_out": left_out,
        "times": times,
    }


def _calls(
    runs_of_sets: Sequence[Sequence[Callable[[Inputs], object]]], sets: Sequence[Sequence[Inputs]]
) -> list[Callable[[], object]]:
    """Return one call for each set, which runs all of its groups in turn."""
    return [
        lambda runs=runs, groups=groups: [run(inputs) for run, inputs in zip(runs, groups, strict=True)]  # type: ignore[misc]
        for runs, groups in zip(runs_of_sets, sets, strict=True)
    ]
