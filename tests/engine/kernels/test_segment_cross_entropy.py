"""Losses and hidden gradients against autograd over all logits at once."""

import pytest
import torch
from torch import nn

from engine.kernels import segment_cross_entropy as kernel
from engine.kernels.segment_cross_entropy import Head, segment_cross_entropy


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_logits", [1, 60, 1 << 24])
def test_equals_autograd(softcap: float | None, bias: bool, chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    linear = nn.Linear(6, 19, bias=bias, dtype=torch.float64).requires_grad_(False)
    hidden = (3 * torch.randn(8, 6, dtype=torch.float64)).requires_grad_()
    targets, weights = torch.randint(0, 19, (8,), dtype=torch.int32), torch.rand(8, dtype=torch.float64)
    z = linear(hidden)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = nn.functional.cross_entropy(z, targets.long(), reduction="none")
    (expected * weights).sum().backward()
    losses, gradient = segment_cross_entropy(Head(linear, softcap), hidden.detach(), targets, weights)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradient, hidden.grad)


def test_forward_only_and_no_rows() -> None:
    head = Head(nn.Linear(4, 5).requires_grad_(False))
    losses, gradient = segment_cross_entropy(head, torch.randn(3, 4), torch.tensor([0, 4, 2]), None)
    assert losses.shape == (3,) and gradient is None
    losses, gradient = segment_cross_entropy(head, torch.randn(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert losses.shape == (0,) and gradient is not None and gradient.shape == (0, 4)


def test_rows_do_not_reach_each_other() -> None:
    head = Head(nn.Linear(4, 5).requires_grad_(False))
    hidden, targets = torch.randn(3, 4), torch.tensor([0, 4, 2])
    sick = hidden.clone()
    sick[1] = float("nan")
    healthy, found = (segment_cross_entropy(head, h, targets, torch.ones(3)) for h in (hidden, sick))
    for expected, other in zip(healthy, found, strict=True):
        assert torch.equal(expected[[0, 2]], other[[0, 2]]) and other[1].isnan().all()
