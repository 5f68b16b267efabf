"""multi_lora's kernels, their own source run on this CPU, against float64: any rank, width, tokens and tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.dropout import DropoutMask, keep_scale
from engine.kernels.multi_lora import LoraUse, LowRank
from engine.kernels.multi_lora_device import LowRankProducts, Wanted, describe, laid_out
from tests.engine.kernels.conftest import MakeLauncher

AnyLauncher = Any  # of conftest: with `device` and, on the host, `launched`
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}  # of the sum of absolute terms
DTYPES = list(TOLERANCE)


@dataclass(frozen=True)
class Shape:
    """One task: its tokens, rank, dropout, and whether it has gains; `by_column`: factors lie transposed in memory."""

    num_tokens: int
    rank: int
    dropout: float = 0.0
    has_gains: bool = False
    by_column: bool = False
    seed: int = 0


@dataclass
class Problem:
    """A stream with these tasks in this order, `gap` foreign tokens before each; drawn by each task's own seed."""

    shapes: Sequence[Shape]
    width_in: int
    width_out: int
    dtype: torch.dtype
    gap: int = 3

    def __post_init__(self) -> None:
        num_tokens = sum(shape.num_tokens + self.gap for shape in self.shapes) + self.gap
        streams = [torch.full((num_tokens, w), 7.0) for w in (self.width_in, self.width_out) * 2]
        self.uses: list[LoraUse] = []
        self.factors: list[LowRank] = []
        start = 0
        for shape in self.shapes:
            start += self.gap
            generator = torch.Generator().manual_seed(shape.seed)
            part = slice(start, start + shape.num_tokens)
            for stream in streams:
                stream[part] = torch.randn(shape.num_tokens, stream.shape[1], generator=generator)
            use, low_rank = self._use(shape, start, generator)
            self.uses.append(use)
            self.factors.append(low_rank)
            start += shape.num_tokens
        self.x, self.y, self.dx, self.dy = (stream.to(self.dtype) for stream in streams)

    def _use(self, shape: Shape, start: int, generator: torch.Generator) -> tuple[LoraUse, LowRank]:
        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        rank, (k, n), mask = shape.rank, (self.width_in, self.width_out), None
        a, b = (draw(k, rank).T, draw(rank, n).T) if shape.by_column else (draw(rank, k), draw(n, rank))
        d, g = (draw(rank), draw(n)) if shape.has_gains else (None, None)
        if shape.dropout:
            positions = np.arange(shape.num_tokens) + 5 * (np.arange(shape.num_tokens) > 20)  # two segments
            mask = DropoutMask(shape.seed, 3, 1, positions, k, shape.dropout)
        scale = keep_scale(shape.dropout) if shape.dropout else 1.0
        use = LoraUse(start, start + shape.num_tokens, 0.25 + shape.seed % 3, mask, scale)
        return use, LowRank(a, b, d, g)

    @property
    def wanted(self) -> list[Wanted]:
        return [Wanted(True, True, shape.has_gains, shape.has_gains) for shape in self.shapes]

    def run(self, launcher: AnyLauncher, wanted: Sequence[Wanted] | None = None) -> "Results":
        rows, runs = describe(self.uses, self.factors)
        factors = [LowRank(*(f if f is None else f.to(launcher.device) for f in own)) for own in self.factors]
        products = LowRankProducts(launcher, rows, runs, factors, self.dtype)
        y, dx, wanted = (
            self.y.to(launcher.device, copy=True),
            self.dx.to(launcher.device, copy=True),
            wanted or self.wanted,
        )
        x, dy = self.x.to(launcher.device), self.dy.to(launcher.device)
        shrunk = products.forward(x, y)
        gradients = products.backward(x if any(w.a for w in wanted) else None, dy, shrunk, dx, wanted)
        return Results(y.cpu(), dx.cpu(), self.views(gradients.cpu(), rows, wanted))

    def views(self, gradients: torch.Tensor, rows: Any, wanted: Sequence[Wanted]) -> list[list[torch.Tensor | None]]:
        """Of each use, the gradients of A, B, d and g, or None."""
        placed, size = laid_out(rows, self.width_in, self.width_out, wanted)
        assert gradients.shape == (size,)
        return [
            [
                gradients[row[n] : row[n] + factor.numel()].view(factor.shape) if want and factor is not None else None
                for n, factor, want in zip(("da", "db", "dd", "dg"), low_rank, wants, strict=True)
            ]
            for row, low_rank, wants in zip(placed, self.factors, wanted, strict=True)
        ]

    def expected(self, of: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double) -> "Results":
        """The equations of engine/kernels/multi_lora.py in float64; `of` reads a tensor."""
        y, dx, gradients = of(self.y), of(self.dx), []
        for use, low_rank in zip(self.uses, self.factors, strict=True):
            part = slice(use.start, use.end)
            a, b = of(low_rank.a_RK), of(low_rank.b_NR)
            d = torch.ones(len(a)).double() if low_rank.shrink_gain_R is None else of(low_rank.shrink_gain_R)
            g = torch.ones(len(b)).double() if low_rank.expand_gain_N is None else of(low_rank.expand_gain_N)
            mask = 1 if use.keep_mask is None else use.keep_mask().double() * use.keep_scale
            dropped, dy = of(self.x[part]) * mask, of(self.dy[part])
            s, e = dropped @ a.T, use.scale * ((g * dy) @ b)
            y[part] += use.scale * g * ((d * s) @ b.T)
            dx[part] += mask * ((d * e) @ a)
            outer = dy.T @ (d * s)
            gradients.append(
                [
                    (d * e).T @ dropped,
                    use.scale * g[:, None] * outer,
                    (e * s).sum(0) if low_rank.shrink_gain_R is not None else None,
                    use.scale * (b * outer).sum(1) if low_rank.expand_gain_N is not None else None,
                ]
            )
        return Results(y, dx, gradients)


@dataclass
class Results:
    y: torch.Tensor
    dx: torch.Tensor
    gradients: list[list[torch.Tensor | None]]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written shows as NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().abs()


def check(problem: Problem, launcher: AnyLauncher) -> None:
    """Each element within a share of what its terms add up to without their signs: no cancellation hides or excuses."""
    found, expected, most = problem.run(launcher), problem.expected(), problem.expected(magnitude)
    outside = torch.ones(len(problem.x), dtype=torch.bool)
    for use in problem.uses:
        outside[use.start : use.end] = False
    assert torch.equal(found.y[outside], problem.y[outside]) and torch.equal(found.dx[outside], problem.dx[outside])
    for own, reference, bound in zip(flat(found), flat(expected), flat(most), strict=True):
        assert (own is None) == (reference is None)
        if own is not None and reference is not None and bound is not None:
            error = ((own.double() - reference).abs() / (bound + 1e-30)).max().item() if own.numel() else 0.0
            assert error <= TOLERANCE[problem.dtype], f"{error:.2e}"  # a NaN fails, too


def flat(results: "Results") -> list[torch.Tensor | None]:
    return [results.y, results.dx, *(gradient for own in results.gradients for gradient in own)]


RANKS = st.one_of(st.integers(1, 24), st.sampled_from([32, 63, 64, 65, 128, 200, 256]))
SHAPES = st.builds(
    Shape,
    num_tokens=st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(120, 135)),
    rank=RANKS,
    dropout=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    has_gains=st.booleans(),
    by_column=st.booleans(),
    seed=st.integers(0, 2**16),
)
WIDTHS = st.one_of(st.integers(1, 140), st.sampled_from([8, 64, 72, 128]))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    width_in=WIDTHS,
    width_out=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1),
)
def test_equals_float64(
    make_launcher: MakeLauncher, shapes: list[Shape], width_in: int, width_out: int, dtype: torch.dtype, seed: int
) -> None:
    check(Problem(shapes, width_in, width_out, dtype), make_launcher(seed))


HOSTILE = {
    "split columns": Problem([Shape(66, 9, 0.2), Shape(1, 17, 0.0, True)], 2100, 1032, torch.bfloat16),
    "split tokens": Problem([Shape(2051, 5, 0.3, True, seed=4)], 24, 40, torch.bfloat16),
    "skewed 1000 to 1": Problem(
        [Shape(1, 64), Shape(1000, 2, seed=1), Shape(1, 1, 0.5, seed=2)], 16, 16, torch.float16
    ),
    "512 tasks": Problem([Shape(i % 3, 1 + i % 5, seed=i) for i in range(512)], 17, 9, torch.bfloat16, gap=0),
    "ranks 1 to 256": Problem([Shape(2, r, seed=r) for r in (1, 2, 4, 7, 31, 256)], 40, 24, torch.float32),
    "no tokens at all": Problem([Shape(0, 3), Shape(0, 70, 0.1, True)], 8, 8, torch.float32),
}


@pytest.mark.parametrize("problem", HOSTILE.values(), ids=HOSTILE)
def test_hostile_shapes(make_launcher: MakeLauncher, problem: Problem) -> None:
    check(problem, make_launcher(1))


def own_bits(problem: Problem, results: Results, seed: int) -> list[torch.Tensor]:
    """All that belongs to the task of this seed."""
    index = next(i for i, shape in enumerate(problem.shapes) if shape.seed == seed)
    part = slice(problem.uses[index].start, problem.uses[index].end)
    return [results.y[part], results.dx[part], *(g for g in results.gradients[index] if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_change_a_bit(make_launcher: MakeLauncher, dtype: torch.dtype) -> None:
    mine = Shape(131, 20, 0.2, True, seed=9)
    others = [Shape(n, r, 0.3 * (n % 2), seed=n) for n, r in ((1, 256), (70, 3), (5, 64))]
    width = 1100 if dtype is torch.bfloat16 else 72  # one width whose sums are split
    orders = [[mine], [*others, mine], [mine, others[2]], [others[1], mine, others[0]]]
    problems = [Problem(shapes, width, 40, dtype, gap) for gap, shapes in enumerate(orders)]
    alone, *beside = [own_bits(p, p.run(make_launcher(0)), mine.seed) for p in problems]
    for bits in beside:
        assert all(torch.equal(a, b) for a, b in zip(alone, bits, strict=True))


def test_a_sick_neighbour_is_not_felt(make_launcher: MakeLauncher) -> None:
    shapes = [Shape(60, 5, seed=1), Shape(30, 9, 0.1, seed=2), Shape(70, 16, seed=3)]
    problem = Problem(shapes, 40, 24, torch.bfloat16, gap=0)
    healthy = problem.run(make_launcher(0))
    sick = problem.uses[1]
    problem.x[sick.start : sick.end] = float("nan")
    problem.dy[sick.start : sick.end] = float("inf")
    problem.factors[1].a_RK.fill_(float("inf"))
    found = problem.run(make_launcher(0))
    for seed in (1, 3):
        pairs = zip(own_bits(problem, healthy, seed), own_bits(problem, found, seed), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert found.y[sick.start : sick.end].isnan().all()


def test_no_order_of_threads_and_blocks_changes_a_bit(make_launcher: MakeLauncher) -> None:
    problem = Problem([Shape(70, 20, 0.2, True), Shape(3, 5, seed=1)], 1100, 72, torch.bfloat16)
    first, *others = [problem.run(make_launcher(seed)) for seed in (0, 1, 2)]
    for other in others:
        assert torch.equal(first.y, other.y) and torch.equal(first.dx, other.dx)
        for own, theirs in zip(first.gradients, other.gradients, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True) if a is not None and b is not None)


def test_only_what_is_wanted_is_computed(make_launcher: MakeLauncher) -> None:
    launcher = make_launcher(0)
    problem = Problem([Shape(20, 5, 0.0, True), Shape(9, 3, seed=1)], 24, 16, torch.float32)
    whole = problem.run(launcher)
    before = getattr(launcher, "launched", []).count("multi_lora_outer_fp32")
    wanted = [Wanted(False, False, True, True), Wanted(False, True, False, False)]  # VeRA, and a frozen A
    found = problem.run(launcher, wanted)
    assert [g is not None for g in found.gradients[0]] == [False, False, True, True]
    assert [g is not None for g in found.gradients[1]] == [False, True, False, False]
    for own, theirs in zip(found.gradients, whole.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True) if a is not None and b is not None)
    if launcher.device.type == "cpu":
        assert launcher.launched.count("multi_lora_outer_fp32") == before + 1  # none over X
