"""Tests multi_affine against float64: its kernel, run on this CPU through its operator, and its reference."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels import cupy_launcher
from engine.kernels import multi_affine as entry
from engine.kernels.multi_affine import AffineUse, multi_affine
from tests.engine.kernels.conftest import MakeLauncher
from tests.engine.kernels.poison import poisoned_memory
from tests.thoroughness import examples

__all__ = ["poisoned_memory"]

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of the sum of absolute terms
SMALLEST = {torch.float16: 1e-7}  # what results lose that are subnormal in this type
DTYPES = list(TOLERANCE)


@dataclass(frozen=True)
class Shape:
    """A use: its tokens, and whether it has a gain and a shift."""

    num_tokens: int
    has_gain: bool = True
    has_shift: bool = True
    seed: int = 0


def leaf(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    return tensor.to(where, copy=True).requires_grad_()


class Problem:
    """Uses in this order, `gap` foreign tokens around each; drawn by each use's own seed."""

    def __init__(self, shapes: list[Shape], width: int, dtype: torch.dtype, gap: int = 2) -> None:
        self.shapes, self.dtype = shapes, dtype
        size = sum(shape.num_tokens + gap for shape in shapes) + gap
        self.x, self.dy = (torch.full((size, width), value) for value in (-0.0, 7.0))
        self.uses: list[AffineUse] = []
        start = 0
        for shape in shapes:
            start += gap
            generator = torch.Generator().manual_seed(shape.seed)
            end = start + shape.num_tokens
            for stream in (self.x, self.dy):
                stream[start:end] = torch.randn(shape.num_tokens, width, generator=generator)
            gain, shift = (torch.randn(width, generator=generator) for _ in range(2))
            self.uses.append(
                AffineUse(start, end, gain if shape.has_gain else None, shift if shape.has_shift else None)
            )
            start = end
        self.x, self.dy = self.x.to(dtype), self.dy.to(dtype)

    def run(self, launcher: Any, *, with_kernel: bool = True) -> list[torch.Tensor | None]:
        """Return Y, dX, and dg and db of each use."""
        where = launcher.device
        x = leaf(self.x, where)
        uses = [
            AffineUse(u.start, u.end, *(v if v is None else leaf(v, where) for v in (u.gain_N, u.shift_N)))
            for u in self.uses
        ]
        with pytest.MonkeyPatch.context() as patch:
            if with_kernel:
                patch.setattr(torch.Tensor, "is_cuda", True)
            y = multi_affine(x, uses)
        y.backward(self.dy.to(where))
        vectors = [vector for use in uses for vector in (use.gain_N, use.shift_N)]
        grads = [None if vector is None else vector.grad for vector in vectors]
        return [t if t is None else t.detach().cpu() for t in (y, x.grad, *grads)]

    def expected(self, of: Any = torch.Tensor.double) -> list[torch.Tensor | None]:
        y, dx, gradients = of(self.x), of(self.dy), []
        for use in self.uses:
            part = slice(use.start, use.end)
            x, dy = of(self.x[part]), of(self.dy[part])
            if use.gain_N is not None:
                y[part] *= of(use.gain_N)
                dx[part] *= of(use.gain_N)
            if use.shift_N is not None:
                y[part] += of(use.shift_N)
            gradients.append((dy * x).sum(0) if use.gain_N is not None else None)
            gradients.append(dy.sum(0) if use.shift_N is not None else None)
        return [y, dx, *gradients]


def magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().abs()


@pytest.fixture
def at(make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the operator use the launcher of a seed."""

    def take(seed: int) -> Any:
        launcher = make_launcher(seed)
        monkeypatch.setattr(cupy_launcher, "launcher_of", lambda _: launcher)
        return launcher

    return take


def check(problem: Problem, launcher: Any, **how: bool) -> None:
    actual, expected, most = problem.run(launcher, **how), problem.expected(), problem.expected(magnitude)
    for tensor, reference, bound in zip(actual, expected, most, strict=True):
        assert (tensor is None) == (reference is None)
        if tensor is not None and reference is not None and bound is not None:
            excess = (tensor.double() - reference).abs() - SMALLEST.get(problem.dtype, 0.0)
            error = (excess / (bound + 1e-30)).max().item() if tensor.numel() else 0.0
            assert error <= TOLERANCE[problem.dtype], f"{error:.2e}"  # a NaN fails, too
    outside = torch.ones(len(problem.x), dtype=torch.bool)
    for use in problem.uses:
        outside[use.start : use.end] = False
    for tensor, stream in zip(actual[:2], (problem.x, problem.dy), strict=True):
        assert tensor is not None and torch.equal(tensor[outside], stream[outside])
        assert torch.equal(tensor[outside].signbit(), stream[outside].signbit())  # -0 stays -0


SHAPES = st.builds(
    Shape,
    num_tokens=st.one_of(st.integers(0, 5), st.integers(125, 135), st.just(300)),
    has_gain=st.booleans(),
    has_shift=st.booleans(),
    seed=st.integers(0, 2**16),
)
WIDTHS = st.one_of(st.integers(1, 140), st.sampled_from([8, 64, 1032, 2051]))


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    width=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    gap=st.integers(0, 2),
    seed=st.integers(0, 1),
)
def test_equals_float64(at: Any, shapes: list[Shape], width: int, dtype: torch.dtype, gap: int, seed: int) -> None:
    check(Problem(shapes, width, dtype, gap), at(seed))


@settings(max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4), dtype=st.sampled_from(DTYPES))
def test_the_reference_equals_float64(at: Any, shapes: list[Shape], dtype: torch.dtype) -> None:
    check(Problem(shapes, 24, dtype), at(0), with_kernel=False)


HOSTILE = {
    "skewed 1000 to 1": Problem([Shape(1), Shape(1000, seed=1), Shape(1, seed=2)], 16, torch.float16),
    "512 uses": Problem([Shape(i % 3, i % 2 == 0, i % 5 > 0, i) for i in range(512)], 17, torch.bfloat16, 0),
    "no tokens at all": Problem([Shape(0), Shape(0, has_gain=False)], 9, torch.float32, 0),
}


@pytest.mark.parametrize("problem", HOSTILE.values(), ids=HOSTILE)
def test_hostile_shapes(at: Any, problem: Problem) -> None:
    check(problem, at(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_and_the_order_of_threads_change_no_bit(at: Any, dtype: torch.dtype) -> None:
    mine, others = Shape(300, seed=9), [Shape(n, seed=n) for n in (1, 70, 131)]

    def own_bits(shapes: list[Shape], gap: int, seed: int) -> list[Any]:
        problem, place = Problem(shapes, 72, dtype, gap), shapes.index(mine)
        y, dx, *gradients = problem.run(at(seed))
        part = slice(problem.uses[place].start, problem.uses[place].end)
        return [y[part], dx[part], *gradients[2 * place : 2 * place + 2]]  # type: ignore[index]

    alone = own_bits([mine], 2, 0)
    orders = [([*others, mine], 0), ([mine, others[2]], 1), ([others[1], mine, others[0]], 3)]
    for seed, (shapes, gap) in enumerate(orders):
        assert all(torch.equal(a, b) for a, b in zip(alone, own_bits(shapes, gap, seed), strict=True))


def test_a_neighbour_with_nan_changes_nothing(at: Any) -> None:
    problem = Problem([Shape(60, seed=1), Shape(30, seed=2), Shape(70, seed=3)], 40, torch.bfloat16)
    healthy = problem.run(at(0))
    sick = slice(problem.uses[1].start, problem.uses[1].end)
    problem.x[sick], problem.dy[sick] = float("nan"), float("inf")
    with_nan = problem.run(at(0))
    for i in (0, 2):
        part = slice(problem.uses[i].start, problem.uses[i].end)
        for before, after in zip(healthy[:2], with_nan[:2], strict=True):
            assert before is not None and after is not None and torch.equal(before[part], after[part])
        for k in (2 + 2 * i, 3 + 2 * i):
            assert torch.equal(healthy[k], with_nan[k])  # type: ignore[arg-type]
    assert with_nan[0][sick].isnan().all()  # type: ignore[index]


def test_frozen_vectors_get_no_gradient_and_nothing_is_saved_for_them(at: Any) -> None:
    launcher = at(0)
    x = torch.randn(5, 8, device=launcher.device)
    gain, shift = torch.randn(8, device=launcher.device), torch.randn(8, device=launcher.device).requires_grad_()
    y, saved = entry.multi_affine_op(x, [1, 4], [3], [gain, shift], False)
    y.sum().backward()
    torch.testing.assert_close(shift.grad, torch.full_like(shift, 3.0))
    assert gain.grad is None and saved.shape == (0, 8)


def test_the_operator_is_what_torch_expects_of_one(at: Any) -> None:
    launcher = at(0)
    x, gain, shift = (torch.randn(*size, device=launcher.device).requires_grad_() for size in ((5, 8), (8,), (8,)))
    torch.library.opcheck(entry.multi_affine_op, (x, [1, 4], [3], [gain, shift], True))


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, vector = torch.zeros(5, 8), torch.zeros(8)
    for uses, words in (
        ([AffineUse(2, 6, vector, None)], "exceeds the 5 tokens"),
        ([AffineUse(2, 4, vector, None), AffineUse(3, 5, vector, None)], "out of order"),
        ([AffineUse(0, 2, torch.zeros(7), None)], r"\(7,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            multi_affine(x, uses)
