"""Tests multi_lora's kernels, run on this CPU, against float64: any rank, width, tokens, tasks and group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.dropout import DropoutMask, keep_scale
from engine.kernels.launch import CachingUploader
from engine.kernels.multi_lora.descriptors import GroupUse, are_laid_out, describe_factors, describe_uses, positions_of
from engine.kernels.multi_lora.device_products import GroupProducts, add_addresses
from engine.kernels.multi_lora.launch_plan import LaunchPlan
from engine.kernels.multi_lora.types import AdapterSlice, LowRank
from tests.engine.kernels import tolerances
from tests.engine.kernels.conftest import MakeLauncher
from tests.thoroughness import examples

AnyLauncher = Any  # of conftest: with `device` and, on the host, `launched`
DTYPES = list(tolerances.PRODUCTS)
STEP, SITE = 3, 1


@dataclass(frozen=True)
class Shape:
    """A task: its tokens, its rank at each operator (0: no adapter), dropout, and whether it has gains.

    `by_column`: its factors are transposed in memory.
    """

    num_tokens: int
    ranks: tuple[int, ...]
    dropout: float = 0.0
    has_gains: bool = False
    by_column: bool = False
    seed: int = 0
    wants: tuple[bool, bool, bool, bool] = (True, True, True, True)  # gradients of A, B, d and g


@dataclass
class Problem:
    """A stream with these tasks in this order, `gap` foreign tokens before each; drawn by each task's own seed.

    Operators in `added` add to a given Y; the others write Y, with their bias if `has_bias`.
    """

    shapes: Sequence[Shape]
    width_in: int
    widths_out: tuple[int, ...]
    dtype: torch.dtype
    gap: int = 3
    added: tuple[int, ...] = (0,)
    has_bias: bool = True

    def __post_init__(self) -> None:
        num_tokens = sum(shape.num_tokens + self.gap for shape in self.shapes) + self.gap
        widths = (self.width_in, *self.widths_out)
        x, *ys = [torch.full((num_tokens, width), 7.0) for width in widths]
        dys = [torch.full((num_tokens, width), 7.0) for width in self.widths_out]
        self.pairs: list[GroupUse] = []
        self.owners: list[int] = []  # of each pair: the seed of its task
        start = 0
        for shape in self.shapes:
            start += self.gap
            generator = torch.Generator().manual_seed(shape.seed)
            for stream in (x, *ys, *dys):
                rows = torch.randn(shape.num_tokens, stream.shape[1], generator=generator)
                stream[start : start + shape.num_tokens] = rows
            for op, rank in enumerate(shape.ranks):
                if rank:
                    self.pairs.append(self._pair(shape, op, rank, start, generator))
                    self.owners.append(shape.seed)
            start += shape.num_tokens
        generator = torch.Generator().manual_seed(0)
        biases = [torch.randn(width, generator=generator) if self.has_bias else None for width in self.widths_out]
        self.biases = [bias if bias is None else bias.to(self.dtype) for bias in biases]
        self.x, self.ys, self.dys = x.to(self.dtype), [y.to(self.dtype) for y in ys], [dy.to(self.dtype) for dy in dys]

    def _pair(self, shape: Shape, op: int, rank: int, start: int, generator: torch.Generator) -> GroupUse:
        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        (k, n), mask = (self.width_in, self.widths_out[op]), None
        a, b = (draw(k, rank).T, draw(rank, n).T) if shape.by_column else (draw(rank, k), draw(n, rank))
        d, g = (draw(rank), draw(n)) if shape.has_gains else (None, None)
        for factor, wants in zip((a, b, d, g), shape.wants, strict=True):
            if factor is not None:
                factor.requires_grad_(wants)
        if shape.dropout:
            positions = np.arange(shape.num_tokens) + 5 * (np.arange(shape.num_tokens) > 20)  # two segments
            mask = DropoutMask(shape.seed, STEP, SITE + op, positions, k, shape.dropout)
        scale = keep_scale(shape.dropout) if shape.dropout else 1.0
        use = AdapterSlice(start, start + shape.num_tokens, 0.25 + (shape.seed + op) % 3, mask, scale)
        return GroupUse(op, use, LowRank(a, b, d, g))

    def run(self, launcher: AnyLauncher, step: torch.Tensor | None = None) -> "Results":
        where = launcher.device
        rows = describe_factors(self.pairs)
        uses = describe_uses(self.pairs, self.width_in, self.widths_out)
        flat = [f.detach().to(where) for pair in self.pairs for f in pair.low_rank if f is not None]
        step = torch.tensor(STEP, device=where) if step is None else step
        steps = [step for pair in self.pairs if pair.use.keep_mask is not None]
        plan = LaunchPlan(uses, rows, len(self.x), (self.width_in, *self.widths_out), self.dtype, launcher)
        table = launcher.upload(add_addresses(rows, flat, steps))
        positions_T = torch.from_numpy(positions_of(self.pairs, len(self.x))).to(where)
        products = GroupProducts(launcher, plan, table, [*flat, step], self.dtype, positions_T)
        x, dys = self.x.to(where), [dy.to(where) for dy in self.dys]
        ys = [y.to(where, copy=True) if op in self.added else torch.empty_like(y) for op, y in enumerate(self.ys)]
        dx = torch.empty_like(x)
        shrunk = products.shrink(x)
        biases = [bias if bias is None else bias.to(where) for bias in self.biases]
        products.write([None if op in self.added else y for op, y in enumerate(ys)], biases, shrunk)
        products.add([y if op in self.added else None for op, y in enumerate(ys)], shrunk)
        trains_a = any(pair.low_rank.a_RK.requires_grad for pair in self.pairs)
        gradients = products.backward(x if trains_a else None, dys, shrunk, dx)
        views = self._views(gradients.cpu(), are_laid_out(uses, rows))
        return Results([y.cpu() for y in ys], dx.cpu(), views)

    def _views(self, gradients: torch.Tensor, laid_out: Sequence[bool]) -> list[list[torch.Tensor | None]]:
        """Return the gradients of A, B, d and g of each use, or None."""
        flags = iter(laid_out)
        views_by_use, start = [], 0
        for pair in self.pairs:
            views: list[torch.Tensor | None] = []
            for factor in pair.low_rank:
                is_there = factor is not None and next(flags)
                size = factor.numel() if is_there and factor is not None else 0
                view = gradients[start : start + size].view(factor.shape) if is_there and factor is not None else None
                views.append(view if factor is not None and factor.requires_grad else None)
                start += size
            views_by_use.append(views)
        assert start == len(gradients)
        return views_by_use

    def expected(self, of: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double) -> "Results":
        """Compute the equations of engine/kernels/multi_lora/dispatch.py in float64; `of` reads a tensor."""
        ys, gradients = [self._before(op, of) for op in range(len(self.ys))], []
        dx = torch.zeros(self.x.shape).double()
        for op, use, low_rank in self.pairs:
            part = slice(use.start, use.end)
            a, b = of(low_rank.a_RK.detach()), of(low_rank.b_NR.detach())
            d, g = (None if gain is None else of(gain.detach()) for gain in low_rank[2:])
            d, g = torch.ones(len(a)).double() if d is None else d, torch.ones(len(b)).double() if g is None else g
            mask = 1 if use.keep_mask is None else use.keep_mask().double() * use.keep_scale
            dropped, dy = of(self.x[part]) * mask, of(self.dys[op][part])
            s, e = dropped @ a.T, use.scale * ((g * dy) @ b)
            ys[op][part] += use.scale * g * ((d * s) @ b.T)
            dx[part] += mask * ((d * e) @ a)
            outer = dy.T @ (d * s)
            computed = [
                (d * e).T @ dropped,
                use.scale * g[:, None] * outer,
                (e * s).sum(0),
                use.scale * (b * outer).sum(1),
            ]
            wanted = [factor is not None and factor.requires_grad for factor in low_rank]
            gradients.append([gradient if wants else None for gradient, wants in zip(computed, wanted, strict=True)])
        return Results(ys, dx, gradients)

    def _before(self, op: int, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        bias = self.biases[op]
        if op in self.added:
            return of(self.ys[op])
        return torch.zeros(self.ys[op].shape).double() + (0 if bias is None else of(bias))

    def covered(self, op: int | None = None) -> torch.Tensor:
        """Return the tokens that a use of this operator, or of any, covers: [T] bool."""
        rows = torch.zeros(len(self.x), dtype=torch.bool)
        for pair in self.pairs:
            if op is None or pair.op == op:
                rows[pair.use.start : pair.use.end] = True
        return rows


@dataclass
class Results:
    ys: list[torch.Tensor]
    dx: torch.Tensor
    gradients: list[list[torch.Tensor | None]]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill allocated memory with NaN, so that memory that is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().abs()


def check(problem: Problem, launcher: AnyLauncher) -> None:
    """Check each element's error against the sum of its terms' magnitudes, so that cancellation hides nothing."""
    actual, expected, most = problem.run(launcher), problem.expected(), problem.expected(magnitude)
    tolerance = tolerances.of_products(problem.dtype, launcher.device)
    for op, y in enumerate(actual.ys):
        outside = ~problem.covered(op)
        assert torch.equal(y[outside], problem._before(op, torch.Tensor.double)[outside].to(y.dtype))
    assert not actual.dx[~problem.covered()].any()
    for tensor, reference, bound in zip(flat(actual), flat(expected), flat(most), strict=True):
        assert (tensor is None) == (reference is None)
        if tensor is not None and reference is not None and bound is not None:
            error = ((tensor.double() - reference).abs() / (bound + 1e-30)).max().item() if tensor.numel() else 0.0
            assert error <= tolerance, f"{error:.2e}"  # a NaN fails, too


def flat(results: "Results") -> list[torch.Tensor | None]:
    return [*results.ys, results.dx, *(gradient for gradients in results.gradients for gradient in gradients)]


RANKS = st.one_of(st.integers(1, 24), st.sampled_from([32, 33, 63, 64, 65, 128, 200, 256]))
WIDTHS = st.one_of(st.integers(1, 140), st.sampled_from([8, 64, 72, 128]))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_operators = draw(st.integers(1, 3))
    shapes = st.builds(
        Shape,
        num_tokens=st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(120, 135)),
        ranks=st.tuples(*[st.one_of(st.just(0), RANKS)] * num_operators),
        dropout=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
        has_gains=st.booleans(),
        by_column=st.booleans(),
        seed=st.integers(0, 2**16),
        wants=st.sampled_from([(True,) * 4, (True,) * 4, (False, True, False, False), (False, False, True, True)]),
    )
    return Problem(
        draw(st.lists(shapes, min_size=1, max_size=4)),
        draw(WIDTHS),
        draw(st.tuples(*[WIDTHS] * num_operators)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([0, 3])),
        draw(st.sampled_from([(), (0,), (0, 1, 2)])),
        draw(st.booleans()),
    )


@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(), seed=st.integers(0, 1))
def test_equals_float64(make_launcher: MakeLauncher, problem: Problem, seed: int) -> None:
    check(problem, make_launcher(seed))


HOSTILE = {
    "split columns": Problem(
        [Shape(66, (9, 3), 0.2), Shape(1, (17, 40), 0.0, True)], 2100, (1032, 530), torch.bfloat16
    ),
    "split tokens": Problem([Shape(2051, (5,), 0.3, True, seed=4)], 24, (40,), torch.bfloat16),
    "split tokens of large ranks": Problem([Shape(1030, (65, 33))], 16, (24, 72), torch.bfloat16),
    "skewed 1000 to 1": Problem(
        [Shape(1, (64,)), Shape(1000, (2,), seed=1), Shape(1, (1,), 0.5, seed=2)], 16, (16,), torch.float16
    ),
    "512 tasks": Problem(
        [Shape(i % 3, (1 + i % 5, i % 2), seed=i) for i in range(512)], 17, (9, 5), torch.bfloat16, gap=0
    ),
    "ranks 1 to 256": Problem(
        [Shape(2, (r, 1, 257 - r), seed=r) for r in (1, 2, 4, 7, 31, 256)], 40, (24, 8, 1), torch.float32
    ),
    "one pass, floats": Problem([Shape(260, (16, 7), seed=3)], 24, (520, 40), torch.float32),
    "one token": Problem([Shape(1, (4, 4, 4))], 8, (8, 8, 8), torch.bfloat16, gap=0),
    "no tokens at all": Problem([Shape(0, (3,)), Shape(0, (70,), 0.1, True)], 8, (8,), torch.float32),
    "no uses": Problem([Shape(3, (0, 0))], 8, (8, 16), torch.float16),
    "eight operators": Problem([Shape(9, tuple(range(1, 9)), 0.1), Shape(70, (9,) * 8)], 72, (8,) * 8, torch.bfloat16),
}


@pytest.mark.parametrize("problem", HOSTILE.values(), ids=HOSTILE)
def test_hostile_shapes(make_launcher: MakeLauncher, problem: Problem) -> None:
    check(problem, make_launcher(1))


def own_bits(problem: Problem, results: Results, seed: int) -> list[torch.Tensor]:
    """Return all results that belong to the task of this seed."""
    mine = [index for index, owner in enumerate(problem.owners) if owner == seed]
    part = slice(problem.pairs[mine[0]].use.start, problem.pairs[mine[0]].use.end)
    gradients = [g for index in mine for g in results.gradients[index] if g is not None]
    return [*(y[part] for y in results.ys), results.dx[part], *gradients]


def assert_equal_bits(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_change_a_bit(make_launcher: MakeLauncher, dtype: torch.dtype, dropout: float) -> None:
    mine = Shape(131, (20, 0, 5), dropout, True, seed=9)
    others = [Shape(n, (r, 3, r // 3), 0.3 * (n % 2), seed=n) for n, r in ((1, 256), (70, 3), (5, 64))]
    width = 1100 if dtype is torch.bfloat16 else 72  # one width whose sums are split
    orders = [[mine], [*others, mine], [mine, others[2]], [others[1], mine, others[0]]]
    problems = [Problem(shapes, width, (40, 24, 16), dtype, gap) for gap, shapes in enumerate(orders)]
    alone, *beside = [own_bits(p, p.run(make_launcher(0)), mine.seed) for p in problems]
    for bits in beside:
        assert_equal_bits(alone, bits)


def test_an_operator_in_a_group_gets_the_bits_it_gets_alone(make_launcher: MakeLauncher) -> None:
    """Ranks that share tiles of X do not change each other; dX is their sum."""
    together = Problem([Shape(70, (20, 9, 5), has_gains=True, seed=2)], 1100, (40, 24, 16), torch.bfloat16)
    results = together.run(make_launcher(0))
    for index in range(3):
        alone = Problem(together.shapes, 1100, (40, 24, 16), torch.bfloat16)
        alone.pairs = [together.pairs[index]]
        one = alone.run(make_launcher(0))
        assert torch.equal(one.ys[index], results.ys[index])
        assert_equal_bits(
            [g for g in one.gradients[0] if g is not None], [g for g in results.gradients[index] if g is not None]
        )


def test_a_neighbour_with_nan_changes_nothing(make_launcher: MakeLauncher) -> None:
    shapes = [Shape(60, (5, 3), seed=1), Shape(30, (9, 9), 0.1, seed=2), Shape(70, (16, 0), seed=3)]
    problem = Problem(shapes, 40, (24, 16), torch.bfloat16, gap=0)
    healthy = problem.run(make_launcher(0))
    sick = problem.pairs[2].use
    problem.x[sick.start : sick.end] = float("nan")
    for dy in problem.dys:
        dy[sick.start : sick.end] = float("inf")
    problem.pairs[2].low_rank.a_RK.detach().fill_(float("inf"))
    with_nan = problem.run(make_launcher(0))
    for seed in (1, 3):
        assert_equal_bits(own_bits(problem, healthy, seed), own_bits(problem, with_nan, seed))
    assert all(y[sick.start : sick.end].isnan().all() for y in with_nan.ys)


def test_no_order_of_threads_and_blocks_changes_a_bit(make_launcher: MakeLauncher) -> None:
    shapes = [Shape(270, (20, 40), 0.2, True), Shape(3, (5, 8), seed=1)]
    problem = Problem(shapes, 1100, (72, 520), torch.bfloat16)
    first, *others = [problem.run(make_launcher(seed)) for seed in (0, 1, 2)]
    for other in others:
        assert_equal_bits([t for t in flat(first) if t is not None], [t for t in flat(other) if t is not None])


def launches(launcher: AnyLauncher, problem: Problem) -> list[str]:
    before = len(launcher.launched)
    problem.run(launcher)
    return [name.removeprefix("multi_lora_").removesuffix("_bf16") for name in launcher.launched[before:]]


def test_a_group_is_few_launches(host_launcher: Callable[[int], AnyLauncher]) -> None:
    """q, k and v together need as many launches as one of them; ranks beyond one pass need two more."""
    one, three = (
        Problem([Shape(20, (8,) * n), Shape(9, (5,) * n, 0.1)], 24, (16,) * n, torch.bfloat16, added=()) for n in (1, 3)
    )
    expected = ["shrink", "expand", "shrink_outer", "outer", "expand"]
    assert launches(host_launcher(0), one) == launches(host_launcher(0), three) == expected
    large = Problem([Shape(20, (8, 40))], 24, (16, 16), torch.bfloat16, added=())
    assert launches(host_launcher(0), large) == [
        "shrink",
        "expand",
        "shrink_outer",
        "shrink",
        "outer",
        "outer",
        "expand",
    ]
    frozen = Problem([Shape(20, (8,), wants=(False,) * 4)], 24, (16,), torch.bfloat16, added=())
    assert launches(host_launcher(0), frozen) == ["shrink", "expand", "shrink", "expand"]


def test_the_step_of_a_mask_is_read_when_a_kernel_runs(make_launcher: MakeLauncher) -> None:
    """A captured graph sees the step change."""
    launcher = make_launcher(0)
    problem = Problem([Shape(40, (4, 6), 0.5)], 40, (24, 16), torch.float32)
    step = torch.tensor(STEP, device=launcher.device)
    first = problem.run(launcher, step)
    changed = problem.run(launcher, step.add_(1))
    assert not torch.equal(first.dx, changed.dx)
    assert_equal_bits([first.dx, *first.ys], [(back := problem.run(launcher, step.sub_(1))).dx, *back.ys])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_fits_the_shared_memory_that_all_architectures_have(dtype: torch.dtype) -> None:
    """A block of sm_86 and sm_89 has 99 KB."""
    for rank in (1, 16, 17, 32, 33, 64, 65, 256):
        problem = Problem([Shape(600, (rank,) * 3, 0.1), Shape(600, (rank,) * 3, has_gains=True)], 40, (24,) * 3, dtype)
        uses = describe_uses(problem.pairs, 40, (24,) * 3)
        rows = describe_factors(problem.pairs)
        plan = LaunchPlan(uses, rows, len(problem.x), (40, 24, 24, 24), dtype, CachingUploader(torch.device("cpu")))
        works = [plan.shrink_input, plan.shrink_output, plan.outer_input, plan.outer_output, plan.shrink_outer]
        works += [plan.expand_input, plan.expand_output((0, 1, 2), False), plan.shrink_gain, plan.expand_gain]
        assert max(work.shared_bytes for work in works) <= 99 << 10
