"""Tests grouped_gemm against float64: its kernel, run on this CPU through its operator, and its reference."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels import cupy_launcher
from engine.kernels import grouped_gemm as entry
from engine.kernels.grouped_gemm_device import MatrixProduct, launch_products
from tests.engine.kernels import tolerances
from tests.engine.kernels.conftest import MakeLauncher
from tests.engine.kernels.poison import poisoned_memory
from tests.thoroughness import examples

__all__ = ["poisoned_memory"]

SMALLEST = {torch.float16: 1e-6}  # what weights lose that are subnormal in this type
DTYPES = list(tolerances.PRODUCTS)


@dataclass(frozen=True)
class Shape:
    """A use: its tokens and widths; `by_column`: its weight is transposed in memory."""

    num_tokens: int
    width_in: int
    width_out: int
    by_column: bool = False
    scale: float = 1.0
    seed: int = 0


@dataclass
class Results:
    """Results by use: C, dA, dW, db."""

    of_use: list[tuple[torch.Tensor, ...]]


class Problem:
    """Uses in this order, each drawn by its own seed."""

    def __init__(self, shapes: list[Shape], dtype: torch.dtype) -> None:
        self.shapes, self.dtype = shapes, dtype
        self.a, self.dc, self.weights, self.biases = [], [], [], []
        for shape in shapes:
            generator = torch.Generator(device="cpu").manual_seed(shape.seed)

            def draw(*size: int, generator: torch.Generator = generator) -> torch.Tensor:
                return torch.randn(size, generator=generator)

            self.a.append(draw(shape.num_tokens, shape.width_in).to(dtype))
            self.dc.append(draw(shape.num_tokens, shape.width_out).to(dtype))
            size = (shape.width_out, shape.width_in)
            self.weights.append(draw(*size[::-1]).T if shape.by_column else draw(*size))
            self.biases.append(draw(shape.width_out))

    def run(self, launcher: Any, *, with_kernel: bool = True) -> Results:
        """Run forward and backward, by the operator or the reference."""
        where = launcher.device
        weights, biases = (
            [t.to(where, copy=True).requires_grad_() for t in tensors] for tensors in (self.weights, self.biases)
        )
        a = torch.cat([t.flatten() for t in self.a]).to(where).requires_grad_()
        dc = torch.cat([t.flatten() for t in self.dc]).to(where)
        function = entry.grouped_gemm_op if with_kernel else entry._reference
        tokens = [shape.num_tokens for shape in self.shapes]
        c = function(a, tokens, weights, biases, [shape.scale for shape in self.shapes])
        c.backward(dc)
        assert a.grad is not None
        cs = entry._split_rows(c.detach().cpu(), tokens, [shape.width_out for shape in self.shapes])
        das = entry._split_rows(a.grad.cpu(), tokens, [shape.width_in for shape in self.shapes])
        gradients = [(w.grad.cpu(), b.grad.cpu()) for w, b in zip(weights, biases, strict=True)]  # type: ignore[union-attr]
        return Results([(c, da, *pair) for c, da, pair in zip(cs, das, gradients, strict=True)])

    def expected(self, of: Any = torch.Tensor.double) -> Results:
        """Compute the results directly. `of` converts each tensor, and the scale, first."""
        of_use = []
        for shape, *tensors in zip(self.shapes, self.a, self.dc, self.weights, self.biases, strict=True):
            a, dc, w, b = (of(tensor) for tensor in tensors)
            s = of(torch.tensor(shape.scale))
            of_use.append((s * (a @ w.T + b), s * (dc @ w), s * (dc.T @ a), s * dc.sum(0)))
        return Results(of_use)


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
    tolerance = tolerances.of_products(problem.dtype, launcher.device)
    for tensors, reference, bounds in zip(actual.of_use, expected.of_use, most.of_use, strict=True):
        for tensor, right, bound in zip(tensors, reference, bounds, strict=True):
            assert tensor.shape == right.shape
            excess = (tensor.double() - right).abs() - SMALLEST.get(problem.dtype, 0.0)
            error = (excess / (bound + 1e-30)).max().item() if tensor.numel() else 0.0
            assert error <= tolerance, f"{error:.2e}"  # a NaN fails, too


WIDTHS = st.one_of(st.integers(1, 24), st.sampled_from([63, 64, 65, 100, 128, 200]))
SHAPES = st.builds(
    Shape,
    num_tokens=st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(120, 135)),
    width_in=WIDTHS,
    width_out=WIDTHS,
    by_column=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, -2.0]),
    seed=st.integers(0, 2**16),
)


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1))
def test_equals_float64(at: Any, shapes: list[Shape], dtype: torch.dtype, seed: int) -> None:
    check(Problem(shapes, dtype), at(seed))


@settings(max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4))
def test_the_reference_equals_float64(at: Any, shapes: list[Shape]) -> None:
    check(Problem(shapes, torch.float32), at(0), with_kernel=False)


HOSTILE = {
    "split depth": Problem([Shape(66, 2100, 9), Shape(1, 1032, 70, True)], torch.bfloat16),
    "split tokens": Problem([Shape(2051, 24, 5, seed=4)], torch.float16),
    "skewed 1000 to 1": Problem([Shape(1, 64, 8), Shape(1000, 2, 16, seed=1), Shape(1, 1, 1, seed=2)], torch.float32),
    "512 uses": Problem([Shape(i % 3, 1 + i % 7, 1 + i % 5, seed=i) for i in range(512)], torch.bfloat16),
    "no tokens at all": Problem([Shape(0, 3, 4), Shape(0, 70, 65, True)], torch.float32),
    "odd ones before even ones": Problem([Shape(1, 3, 3), Shape(5, 8, 4), Shape(3, 16, 64)], torch.bfloat16),
}


@pytest.mark.parametrize("problem", HOSTILE.values(), ids=HOSTILE)
def test_hostile_shapes(at: Any, problem: Problem) -> None:
    check(problem, at(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_change_a_bit(at: Any, dtype: torch.dtype) -> None:
    mine = Shape(131, 1100 if dtype is torch.bfloat16 else 72, 40, scale=0.5, seed=9)
    others = [Shape(n, r, 16, seed=n) for n, r in ((1, 128), (70, 3), (5, 64))]
    orders = [[mine], [*others, mine], [mine, others[2]], [others[1], mine, others[0]]]
    launcher = at(0)
    alone, *beside = [Problem(shapes, dtype).run(launcher).of_use[shapes.index(mine)] for shapes in orders]
    for bits in beside:
        assert all(torch.equal(a, b) for a, b in zip(alone, bits, strict=True))


def test_no_order_of_threads_and_blocks_changes_a_bit(at: Any) -> None:
    problem = Problem([Shape(70, 1100, 20), Shape(3, 5, 72, seed=1)], torch.bfloat16)
    first, *others = [problem.run(at(seed)).of_use for seed in (0, 1, 2)]
    for other in others:
        for tensors, theirs in zip(first, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors, theirs, strict=True))


def test_a_neighbour_with_nan_changes_nothing(at: Any) -> None:
    problem = Problem([Shape(60, 40, 5, seed=1), Shape(30, 9, 30, seed=2), Shape(70, 16, 16, seed=3)], torch.bfloat16)
    healthy = problem.run(at(0)).of_use
    problem.a[1].fill_(float("nan"))
    problem.dc[1].fill_(float("inf"))
    with_nan = problem.run(at(0)).of_use
    for i in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(healthy[i], with_nan[i], strict=True))
    assert with_nan[1][0].isnan().all()


def test_only_what_is_wanted_is_computed(at: Any) -> None:
    launcher = at(0)
    a = torch.randn(2 * 3, device=launcher.device)
    weight, bias = torch.randn(4, 3, device=launcher.device), torch.randn(4, device=launcher.device)
    before = len(getattr(launcher, "launched", []))
    c = entry.grouped_gemm_op(a, [2], [weight.requires_grad_()], [bias], [1.0])
    c.sum().backward()
    assert weight.grad is not None and bias.grad is None
    expected = a.view(2, 3).sum(0).expand(4, 3)
    torch.testing.assert_close(weight.grad, expected)
    if launcher.device.type == "cpu":
        assert launcher.launched[before:] == ["grouped_gemm_fp32"] * 2  # none for dA


def test_the_operators_are_what_torch_expects_of_one(at: Any) -> None:
    launcher = at(0)
    a, weight, bias = (torch.randn(*size, device=launcher.device).requires_grad_() for size in ((6,), (4, 3), (4,)))
    torch.library.opcheck(entry.grouped_gemm_op, (a, [2], [weight], [bias], [0.5]))


def test_arguments_that_do_not_fit_are_refused() -> None:
    a, weight, bias = torch.zeros(6), torch.zeros(4, 3), torch.zeros(4)
    for arguments, words in (
        ((a, [3], [weight], [bias], [1.0]), "9 elements"),
        ((a, [2], [weight], [bias, bias], [1.0]), "2 biases"),
        ((a, [2], [weight], [torch.zeros(3)], [1.0]), r"bias \(3,\)"),
        ((a, [2], [weight.half()], [], [1.0]), "float16"),
    ):
        with pytest.raises(ValueError, match=words):
            entry.grouped_gemm(*arguments)


def test_matrices_dense_along_no_dimension_are_refused(make_launcher: MakeLauncher) -> None:
    launcher = make_launcher(0)
    a, b, c = (torch.zeros(8, 8, device=launcher.device) for _ in range(3))
    with pytest.raises(ValueError, match="strides"):
        launch_products(launcher, [MatrixProduct(a[::2, ::2], b[:4, :4], c[:4, :4].contiguous(), 1.0)])
