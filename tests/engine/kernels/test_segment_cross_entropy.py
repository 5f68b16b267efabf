"""Tests losses and hidden gradients against autograd over all logits at once."""

from typing import Any

import pytest
import torch
from torch import nn

from engine.kernels import segment_cross_entropy as kernel
from engine.kernels.segment_cross_entropy import OutputHead, segment_cross_entropy
from tests.engine.kernels.conftest import MakeLauncher


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_logits", [1, 60, 1 << 24])
def test_equals_autograd(softcap: float | None, bias: bool, chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    linear = nn.Linear(6, 19, bias=bias, dtype=torch.float64).requires_grad_(False)
    hidden = (3 * torch.randn(8, 6, dtype=torch.float64)).requires_grad_()
    targets, weights = torch.randint(0, 19, (8,), dtype=torch.int32), torch.rand(8, dtype=torch.float64)
    z = linear(hidden)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = nn.functional.cross_entropy(z, targets.long(), reduction="none")
    (expected * weights).sum().backward()
    losses, gradient = segment_cross_entropy(OutputHead(linear, softcap), hidden.detach(), targets, weights)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradient, hidden.grad)


def test_forward_only_and_no_rows() -> None:
    head = OutputHead(nn.Linear(4, 5).requires_grad_(False))
    losses, gradient = segment_cross_entropy(head, torch.randn(3, 4), torch.tensor([0, 4, 2]), None)
    assert losses.shape == (3,) and gradient is None
    losses, gradient = segment_cross_entropy(head, torch.randn(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert losses.shape == (0,) and gradient is not None and gradient.shape == (0, 4)


def test_rows_do_not_reach_each_other() -> None:
    head = OutputHead(nn.Linear(4, 5).requires_grad_(False))
    hidden, targets = torch.randn(3, 4), torch.tensor([0, 4, 2])
    sick = hidden.clone()
    sick[1] = float("nan")
    healthy, with_nan = (segment_cross_entropy(head, h, targets, torch.ones(3)) for h in (hidden, sick))
    for expected, other in zip(healthy, with_nan, strict=True):
        assert torch.equal(expected[[0, 2]], other[[0, 2]]) and other[1].isnan().all()


def by_kernel(launcher: Any, wide: torch.Tensor, width: int, *rest: Any) -> torch.Tensor:
    """Return losses by the kernel; the first columns of `wide` become the gradient."""
    on_device = wide.to(launcher.device)
    moved = [value.to(launcher.device) if isinstance(value, torch.Tensor) else value for value in rest]
    losses = kernel.logits_gradient_(launcher, on_device[:, :width], *moved).cpu()
    wide.copy_(on_device)
    return losses


TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("width", [1, 7, 128, 1031, 4096])
def test_the_kernel_equals_float64(
    make_launcher: MakeLauncher, dtype: torch.dtype, softcap: float | None, width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    wide = (4 * torch.randn(5, width + 3, generator=generator)).to(dtype)
    z = wide[:, :width]  # rows that do not begin at 16 bytes, and something beside them
    targets, weights = torch.randint(0, width, (5,), generator=generator), torch.rand(5, generator=generator)
    exact = z.double().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    expected = nn.functional.cross_entropy(capped, targets, reduction="none")
    (expected * weights).sum().backward()
    before = wide.clone()
    alone = by_kernel(make_launcher(0), wide, width, targets, None, softcap)
    assert torch.equal(wide, before)
    losses = by_kernel(make_launcher(1), wide, width, targets, weights, softcap)
    assert torch.equal(alone, losses) and torch.equal(wide[:, width:], before[:, width:])
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(z.double(), exact.grad, rtol=tolerance, atol=tolerance * 0.1)


def test_the_kernels_rows_do_not_reach_each_other(make_launcher: MakeLauncher) -> None:
    healthy = torch.randn(6, 300)
    sick = healthy.clone()
    sick[1, 7], sick[3, 200], sick[4, 0] = float("nan"), float("inf"), float("-inf")
    targets, weights = torch.tensor([1, 2, 3, 4, 5, 6]), torch.ones(6)
    expected, actual = (by_kernel(make_launcher(1), z, 300, targets, weights, None) for z in (healthy, sick))
    assert torch.equal(expected[[0, 2, 5]], actual[[0, 2, 5]]) and torch.equal(healthy[[0, 2, 5]], sick[[0, 2, 5]])
    assert not actual[1].isfinite() and not actual[3].isfinite() and actual[4].isfinite()


def test_the_kernel_reads_no_logit_that_is_not_there(make_launcher: MakeLauncher) -> None:
    z, targets = torch.randn(3, 10), torch.tensor([2, 10, -1])
    losses = by_kernel(make_launcher(0), z, 10, targets, torch.ones(3), None)
    assert losses[0].isfinite() and losses[1:].isnan().all()
