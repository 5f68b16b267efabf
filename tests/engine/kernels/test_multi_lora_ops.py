"""The operators that a backbone on CUDA goes through, on this CPU: their autograd against the reference's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels import device, multi_lora, multi_lora_ops
from engine.kernels.dropout import DropoutMask, keep_scale
from engine.kernels.multi_lora import LoraUse, LowRank
from tests.engine.kernels.conftest import MakeLauncher

WIDTH_IN, WIDTH_OUT, TOKENS = 40, 24, 90


@pytest.fixture(autouse=True)
def where(make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All tensors of a test are made on the launcher's device."""
    launcher = make_launcher(0)
    monkeypatch.setattr(device, "launcher_of", lambda _: launcher)
    with launcher.device:
        yield


def here() -> torch.device:
    return torch.get_default_device()


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size) + seed), device="cpu").to(here())


def mask(length: int) -> DropoutMask:
    return DropoutMask(4, 1, 2, np.arange(length), WIDTH_IN, 0.25, here())


def uses() -> list[LoraUse]:
    return [LoraUse(2, 33, 0.5), LoraUse(40, 72, 2.0, mask(32), keep_scale(0.25)), LoraUse(72, 90, 1.0)]


def make() -> list[LowRank]:
    """LoRA, LoRA whose A is a frozen slice of something wider (as VeRA's) with gains, and a transposed B (as MiSS')."""
    wide = draw(5, WIDTH_IN + 3)
    factors = [
        LowRank(draw(4, WIDTH_IN), draw(WIDTH_OUT, 4)),
        LowRank(wide[:, :WIDTH_IN], draw(WIDTH_OUT, 5), draw(5), draw(WIDTH_OUT, seed=1)),
        LowRank(draw(3, WIDTH_IN), draw(3, WIDTH_OUT, seed=2).T),
    ]
    for factor in (*factors[0], *factors[1][2:], factors[2].b_NR):
        if factor is not None:
            factor.requires_grad_()
    return factors


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    """The torch path, also for what is on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_lora, "_on_device", lambda *_: False)
        return multi_lora.multi_lora(x, weight, bias, *rest)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_autograd_equals_the_references(with_bias: bool, needs_dx: bool) -> None:
    weight, bias = draw(WIDTH_IN, WIDTH_OUT), draw(WIDTH_OUT) if with_bias else None
    found, expected = [], []
    for entry, results in ((multi_lora_ops.run, found), (reference, expected)):
        x, factors = draw(TOKENS, WIDTH_IN).requires_grad_(needs_dx), make()
        y = entry(x, weight, bias, uses(), factors)
        (y * draw(TOKENS, WIDTH_OUT, seed=3)).sum().backward()
        results += [y.detach(), x.grad, *(f.grad for low_rank in factors for f in low_rank if f is not None)]
    assert [t is None for t in found] == [t is None for t in expected]
    for own, theirs in zip(found, expected, strict=True):
        if own is not None:
            torch.testing.assert_close(own, theirs, rtol=2e-5, atol=2e-5)


def test_factors_in_another_type_are_cast_and_their_gradients_cast_back() -> None:
    x, weight = draw(TOKENS, WIDTH_IN).bfloat16(), draw(WIDTH_IN, WIDTH_OUT).bfloat16()
    factors = [LowRank(draw(4, WIDTH_IN).bfloat16().requires_grad_(), draw(WIDTH_OUT, 4).double().requires_grad_())]
    multi_lora_ops.run(x, weight, None, [LoraUse(0, 50, 1.0)], factors).sum().backward()
    assert factors[0].a_RK.grad is not None and factors[0].a_RK.grad.dtype == torch.bfloat16
    assert factors[0].b_NR.grad is not None and factors[0].b_NR.grad.dtype == torch.float64


def test_x_is_kept_only_where_an_a_is_trained() -> None:
    x, weight = draw(TOKENS, WIDTH_IN).requires_grad_(), draw(WIDTH_IN, WIDTH_OUT)
    for trains_a in (True, False):
        factors = [LowRank(draw(4, WIDTH_IN).requires_grad_(trains_a), draw(WIDTH_OUT, 4).requires_grad_())]
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t):
            multi_lora_ops.run(x, weight, None, [LoraUse(0, 50, 1.0)], factors)
        assert (x.data_ptr() in kept) == trains_a


def test_torch_accepts_the_operators() -> None:
    factors = make()
    rows, runs = multi_lora_ops.describe(uses(), factors)
    flat = [f.detach().clone().requires_grad_() for low_rank in factors for f in low_rank if f is not None]
    arguments = (
        draw(TOKENS, WIDTH_IN).requires_grad_(),
        draw(WIDTH_IN, WIDTH_OUT),
        None,
        flat,
        torch.from_numpy(np.frombuffer(rows.tobytes(), np.uint8).copy()).cpu(),
        torch.from_numpy(np.frombuffer(runs.tobytes(), np.uint8).copy()).cpu(),
    )
    torch.library.opcheck(
        multi_lora_ops.multi_lora_op, arguments, test_utils=("test_faketensor", "test_autograd_registration")
    )


def test_what_does_not_fit_together_is_refused() -> None:
    x, weight, factors = draw(TOKENS, WIDTH_IN), draw(WIDTH_IN, WIDTH_OUT), make()
    with pytest.raises(ValueError, match="weight_KN is"):
        multi_lora_ops.run(x, weight.double(), None, uses(), factors)
    with pytest.raises(ValueError, match="on meta"):
        multi_lora_ops.run(
            x, weight, None, uses(), [*factors[:2], LowRank(factors[2].a_RK.to("meta"), factors[2].b_NR)]
        )
