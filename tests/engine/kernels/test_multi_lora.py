"""multi_lora against plain autograd, by finite differences, and by what it keeps for backward."""

from typing import Any

import pytest
import torch

from engine.kernels.multi_lora import LoraUse, multi_lora


def make(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    factors = [draw(2, 5), draw(7, 2), draw(3, 5), draw(7, 3)]  # ranks 2 and 3, K 5, N 7
    return draw(11, 5), draw(5, 7), draw(7), [f.requires_grad_() for f in factors]


MASK = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) > 0.3
USES = {
    "plain": [LoraUse(1, 4, 0.5), LoraUse(6, 10, 2.0)],
    "dropout": [LoraUse(1, 4, 0.5), LoraUse(6, 10, 2.0, lambda: MASK, 1.25)],
    "empty": [LoraUse(3, 3, 0.5), LoraUse(7, 11, 2.0)],
    "out of order": [LoraUse(6, 10, 2.0), LoraUse(0, 6, 0.5)],
}


def reference(x: Any, w: Any, b: Any, uses: list[LoraUse], factors: list[torch.Tensor]) -> torch.Tensor:
    y = x @ w + (0 if b is None else b)
    for use, a, b_factor in zip(uses, factors[::2], factors[1::2], strict=True):
        part = x[use.start : use.end]
        if use.keep_mask:
            part = part * use.keep_mask() * use.keep_scale
        row = torch.zeros_like(y)
        row[use.start : use.end] = part @ a.T @ b_factor.T * use.scale
        y = y + row
    return y


@pytest.mark.parametrize("uses", USES.values(), ids=USES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_autograd(uses: list[LoraUse], with_bias: bool) -> None:
    x, w, bias, factors = make()
    b = bias if with_bias else None
    x.requires_grad_()
    upstream = torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = multi_lora(x, w, b, uses, factors), reference(x, w, b, uses, factors)
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad(ours, [x, *factors], upstream)
    expected = torch.autograd.grad(theirs, [x, *factors], upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("uses", USES.values(), ids=USES)
def test_gradients_by_finite_differences(uses: list[LoraUse]) -> None:
    x, w, b, factors = make()
    assert torch.autograd.gradcheck(lambda x, *f: multi_lora(x, w, b, uses, f), (x.requires_grad_(), *factors))


def test_no_input_gradient_where_nothing_upstream_needs_one() -> None:
    x, w, b, factors = make()
    multi_lora(x, w, b, USES["plain"], factors).sum().backward()
    assert x.grad is None and w.grad is None and b.grad is None and all(f.grad is not None for f in factors)


def test_backward_keeps_only_what_adapters_need() -> None:
    x, w, b, factors = make()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multi_lora(x.requires_grad_(), w, b, USES["plain"], factors)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for known in (x, w, *factors):  # nothing but x, the frozen weight itself and the factors ...
        storages.pop(known.untyped_storage().data_ptr(), None)
    assert sum(storages.values()) <= (3 * 2 + 4 * 3) * 8  # ... and the shrunk rows S: [3, 2] and [4, 3]


@pytest.mark.parametrize(
    "uses",
    [[LoraUse(0, 4, 1.0), LoraUse(3, 5, 1.0)], [LoraUse(0, 4, 1.0), LoraUse(9, 12, 1.0)], [LoraUse(0, 4, 1.0)]],
    ids=["overlap", "beyond", "too few"],
)
def test_ranges_that_do_not_fit_are_refused(uses: list[LoraUse]) -> None:
    x, w, b, factors = make()
    with pytest.raises(ValueError, match=r"overlaps|leaves|factors"):
        multi_lora(x, w, b, uses, factors)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, w, b, factors = make()
    with pytest.raises(ValueError, match="do not fit"):
        multi_lora(x, w, b, USES["plain"], [factors[0], factors[3], *factors[2:]])
    with pytest.raises(ValueError, match="rows"):
        multi_lora(x, w.T, b, USES["plain"], factors)
