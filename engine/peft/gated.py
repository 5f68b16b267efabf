"""Gated feed-forward networks, down(activation(gate(x)) * up(x)), whose product keeps only what it is made of.

Backward makes the activation again, and the product where `down` is adapted. Legend: T tokens, K inputs, F inner width.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from engine.peft.remakes import Remakes

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def mount_gated(model: nn.Module, remakes: Remakes) -> None:
    """All of `model`, told by the names of their parts, as transformers has them, and by trying."""
    for module in model.modules():
        if {name for name, _ in module.named_children()} == _PARTS:
            forward = partial(_forward, module, remakes)
            if _is_same(module, forward):
                module.forward = forward


@torch.no_grad()
def _is_same(module: Any, forward: Any) -> bool:
    weight, width = module.gate_proj.weight, module.gate_proj.in_features
    x_1TK = torch.linspace(-1, 1, 3 * width, device=weight.device, dtype=weight.dtype).view(1, 3, width)
    return torch.equal(module.forward(x_1TK), forward(x_1TK))


def _forward(module: Any, remakes: Remakes, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    product: torch.Tensor = _Gated.apply(module.act_fn, gate, up)  # type: ignore[no-untyped-call]
    remakes.note(product, lambda gate, up: module.act_fn(gate) * up, gate, up)
    result: torch.Tensor = module.down_proj(product)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Any, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate_TF, up_TF)
        product_TF: torch.Tensor = activation(gate_TF) * up_TF
        return product_TF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dproduct_TF: torch.Tensor) -> tuple[Any, ...]:
        gate_TF, up_TF = ctx.saved_tensors
        with torch.enable_grad():
            gate_TF = gate_TF.detach().requires_grad_()
            active_TF = ctx.activation(gate_TF)
        (dgate_TF,) = torch.autograd.grad(active_TF, gate_TF, dproduct_TF * up_TF)
        return None, dgate_TF, dproduct_TF * active_TF.detach()
