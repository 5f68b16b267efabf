"""Tests multi_lora against plain autograd, by finite differences, and by the tensors that it saves for backward."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.kernels.constants import MAX_OPERATORS
from engine.kernels.multi_lora.dispatch import multi_lora
from engine.kernels.multi_lora.types import AdapterSlice, LowRank, Operator


def make(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[LowRank]]:
    """Return factors to train: A and B of the first pair, and A, B and gains of the second."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    pairs = [LowRank(draw(2, 5), draw(7, 2)), LowRank(draw(3, 5), draw(7, 3), draw(3), draw(7))]  # K 5, N 7
    for factor in trained(pairs):
        factor.requires_grad_()
    return draw(11, 5), draw(5, 7), draw(7), pairs


def alone(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, uses: list[AdapterSlice], pairs: list[LowRank]
) -> torch.Tensor:
    [y] = multi_lora(x, [Operator(w, b, uses, pairs)])
    return y


def trained(pairs: Sequence[LowRank]) -> list[torch.Tensor]:
    return [factor for pair in pairs for factor in pair if factor is not None]


def paired(flat: Sequence[torch.Tensor]) -> list[LowRank]:
    return [LowRank(*flat[:2]), LowRank(*flat[2:])]


MASK = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) > 0.3
USES = {
    "plain": [AdapterSlice(1, 4, 0.5), AdapterSlice(6, 10, 2.0)],
    "dropout": [AdapterSlice(1, 4, 0.5), AdapterSlice(6, 10, 2.0, lambda: MASK, 1.25)],
    "empty": [AdapterSlice(3, 3, 0.5), AdapterSlice(7, 11, 2.0)],
    "out of order": [AdapterSlice(6, 10, 2.0), AdapterSlice(0, 6, 0.5)],
}


def reference(x: Any, w: Any, b: Any, uses: list[AdapterSlice], pairs: list[LowRank]) -> torch.Tensor:
    y = x @ w + (0 if b is None else b)
    for use, (a, b_factor, d, g) in zip(uses, pairs, strict=True):
        part = x[use.start : use.end]
        if use.keep_mask:
            part = part * use.keep_mask() * use.keep_scale
        row = torch.zeros_like(y)
        row[use.start : use.end] = ((part @ a.T) * (1 if d is None else d)) @ b_factor.T * (1 if g is None else g)
        y = y + row * use.scale
    return y


@pytest.mark.parametrize("uses", USES.values(), ids=USES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_autograd(uses: list[AdapterSlice], with_bias: bool) -> None:
    x, w, bias, pairs = make()
    b = bias if with_bias else None
    x.requires_grad_()
    upstream = torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = alone(x, w, b, uses, pairs), reference(x, w, b, uses, pairs)
    torch.testing.assert_close(ours, theirs)
    gradients = torch.autograd.grad(ours, [x, *trained(pairs)], upstream)
    expected = torch.autograd.grad(theirs, [x, *trained(pairs)], upstream)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("uses", USES.values(), ids=USES)
def test_gradients_by_finite_differences(uses: list[AdapterSlice]) -> None:
    x, w, b, pairs = make()
    inputs = (x.requires_grad_(), *trained(pairs))
    assert torch.autograd.gradcheck(lambda x, *flat: alone(x, w, b, uses, paired(flat)), inputs)


@pytest.mark.parametrize("which", range(6))
def test_a_frozen_factor_gets_no_gradient_and_changes_no_other(which: int) -> None:
    x, w, b, pairs = make()
    x.requires_grad_()
    expected = torch.autograd.grad(alone(x, w, b, USES["dropout"], pairs).square().sum(), [x, *trained(pairs)])
    for index, factor in enumerate(trained(pairs)):
        factor.requires_grad_(index == which)
    alone(x, w, b, USES["dropout"], pairs).square().sum().backward()
    torch.testing.assert_close([x.grad, trained(pairs)[which].grad], [expected[0], expected[1 + which]])
    assert [index for index, factor in enumerate(trained(pairs)) if factor.grad is not None] == [which]


def test_no_input_gradient_where_nothing_upstream_needs_one() -> None:
    x, w, b, pairs = make()
    alone(x, w, b, USES["plain"], pairs).sum().backward()
    assert x.grad is None and w.grad is None and b.grad is None
    assert all(factor.grad is not None for factor in trained(pairs))


@pytest.mark.parametrize("trains_a", [True, False])
def test_backward_keeps_only_what_adapters_need(trains_a: bool) -> None:
    x, w, b, pairs = make()
    for pair in pairs:
        pair.a_RK.requires_grad_(trains_a)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        alone(x.requires_grad_(), w, b, USES["plain"], pairs)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for tensor in (w, *trained(pairs)):  # nothing but the frozen weight itself, the factors ...
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert (storages.pop(x.untyped_storage().data_ptr(), None) is not None) == trains_a  # ... x for A's gradient ...
    assert sum(storages.values()) == (3 * 2 + 4 * 3) * 8  # ... and the shrunk rows S: [3, 2] and [4, 3]


@pytest.mark.parametrize(
    "uses",
    [
        [AdapterSlice(0, 4, 1.0), AdapterSlice(3, 5, 1.0)],
        [AdapterSlice(0, 4, 1.0), AdapterSlice(9, 12, 1.0)],
        [AdapterSlice(0, 4, 1.0)],
    ],
    ids=["overlap", "beyond", "too few"],
)
def test_ranges_that_do_not_fit_are_refused(uses: list[AdapterSlice]) -> None:
    x, w, b, pairs = make()
    with pytest.raises(ValueError, match=r"overlaps|exceeds|factors"):
        alone(x, w, b, uses, pairs)


def group() -> tuple[torch.Tensor, list[Operator]]:
    """Return three operators of different widths on one X: two with various uses, the third without any."""
    x, w, b, pairs = make()
    generator = torch.Generator().manual_seed(5)
    w2, w3 = (torch.randn(5, n, generator=generator, dtype=x.dtype) for n in (4, 2))
    small = LowRank(
        *(torch.randn(size, generator=generator, dtype=x.dtype).requires_grad_() for size in ((2, 5), (4, 2)))
    )
    return x, [
        Operator(w, b, USES["dropout"], pairs),
        Operator(w2, None, USES["dropout"][1:], [small]),
        Operator(w3, None, [], []),
    ]


def test_a_group_is_its_operators_one_by_one() -> None:
    x, operators = group()
    x.requires_grad_()
    leaves = [x, *(factor for operator in operators for factor in trained(operator.factors))]
    ours = multi_lora(x, operators)
    theirs = [reference(x, *operator[:4]) for operator in operators]
    torch.testing.assert_close(list(ours), theirs)
    upstream = [torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2)) for y in theirs]
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream)
    )


def test_gradients_of_a_group_by_finite_differences() -> None:
    x, operators = group()
    counts = [len(trained(operator.factors)) for operator in operators]

    def run(x: torch.Tensor, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, second, third = operators
        with_factors = [
            first._replace(factors=paired(flat[: counts[0]])),
            second._replace(factors=[LowRank(*flat[counts[0] :])]),
        ]
        return multi_lora(x, [*with_factors, third])

    leaves = [factor for operator in operators for factor in trained(operator.factors)]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *leaves))


def test_groups_that_do_not_fit_are_refused() -> None:
    x, [first, second, third] = group()
    with pytest.raises(ValueError, match="without being equal"):
        multi_lora(x, [first, second._replace(uses=[AdapterSlice(5, 9, 1.0)])])
    with pytest.raises(ValueError, match=f"1 to {MAX_OPERATORS} operators, got 9"):
        multi_lora(x, [third] * 9)
    with pytest.raises(ValueError, match="got 0"):
        multi_lora(x, [])
    with pytest.raises(ValueError, match="bias_N"):
        multi_lora(x, [third._replace(bias_N=first.bias_N)])


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, w, b, (first, second) = make()
    with pytest.raises(ValueError, match="do not fit"):
        alone(x, w, b, USES["plain"], [first._replace(b_NR=second.b_NR), second])
    with pytest.raises(ValueError, match="rows"):
        alone(x, w.T, b, USES["plain"], [first, second])
    for wrong in (
        second._replace(shrink_gain_R=second.expand_gain_N),
        second._replace(expand_gain_N=second.shrink_gain_R),
    ):
        with pytest.raises(ValueError, match="gain"):
            alone(x, w, b, USES["plain"], [first, wrong])
