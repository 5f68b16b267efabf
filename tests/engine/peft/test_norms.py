"""Where a task trains a norm's vectors, its span gets the norm's output with these vectors."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.methods import Selective
from engine.peft.mounted import MountedNorm, gain_of
from tests.engine.peft.test_gradients import attach, layout_of

WIDTH = 24


def norm_of(kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    norm = kind(WIDTH)
    for vector in norm.parameters():
        nn.init.normal_(vector)
    return norm.to(dtype).requires_grad_(False)


def with_a_zero(norm: Any) -> Any:
    norm.weight[3] = -1.0 if isinstance(norm, GemmaRMSNorm) else 0.0
    return norm


KINDS = {"rms": LlamaRMSNorm, "one more": GemmaRMSNorm, "layer": nn.LayerNorm}


@pytest.mark.parametrize("has_zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_span_gets_the_norm_of_its_task(kind: Any, dtype: torch.dtype, has_zero: bool) -> None:
    norm = norm_of(kind, dtype)
    if has_zero:
        norm = with_a_zero(norm)
    exact = copy.deepcopy(norm).float()
    methods = {"a": Selective(("all-norms",)), "b": Selective(("n.weight",))}
    layout = layout_of(methods, num_tokens=5)
    mounted = MountedNorm(norm, "n", 0, layout)
    few_digits = kind is nn.LayerNorm and dtype is torch.bfloat16
    assert (mounted.op.gain_N is None) == (has_zero or few_digits)  # then it is run again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float64", torch.float32)  # the type of tasks' parameters
        attach(mounted, methods)
    x_1TN = torch.randn(1, layout.num_tokens, WIDTH).to(dtype)
    actual = norm(x_1TN)[0].float()
    expected = exact(x_1TN.float())[0]
    for span in layout.spans:
        task_norm = copy.deepcopy(exact)
        task_norm._forward_hooks.clear()
        for name, vector in mounted.adapters[span.task].tensors.items():
            getattr(task_norm, name).copy_(vector.detach())
        expected[span.start : span.end] = task_norm(x_1TN.float())[0][span.start : span.end]
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_gain_of_a_norm_is_found_by_running_it() -> None:
    for kind, offset in ((LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0), (nn.LayerNorm, 0.0)):
        norm = norm_of(kind)
        gain_N = gain_of(norm)
        assert gain_N is not None and torch.equal(gain_N, norm.weight + offset)


class Squared(nn.Module):
    """Multiplies by the square of its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.square() * x


class Gated(Squared):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight * x * gate  # type: ignore[operator]


def test_a_norm_with_another_factor_has_no_gain() -> None:
    assert gain_of(norm_of(Squared)) is None and gain_of(norm_of(Gated)) is None
