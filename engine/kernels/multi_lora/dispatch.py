"""Frozen linear operators that read the same X, with low-rank adapters of many tasks on one packed stream.

For each operator i of the group (q, k and v; gate and up; a single operator is a group of one):
    Y_i = X W_i + b_i;   for each use u of it:  Y_i[u] += scale_u * g_u o ((d_u o (drop_u(X[u]) A_u^T)) B_u^T)

d [R] and g [N] are learned gains of the two products (VeRA); without them it is LoRA. Backward, with dY_i given and
S = drop(X[u]) A^T:
    E = scale * ((g o dY_i[u]) B);   dX = sum over i of (sum over u of drop'((d o E) A) + dY_i W_i^T);
    dA = (d o E)^T drop(X[u]);   dd = sum(E o S);
    dB = scale * (g o dY_i[u])^T (d o S);   dg = scale * rowsum(B o (dY_i[u]^T (d o S)))
Products are accumulated into dX in place. The backbone's W and b get no gradient, and nothing is saved for them. S is
saved of each use, and X if a use trains its A: not if A is frozen (VeRA, MiSS).

On CUDA, cuda/multi_lora.cu computes it (`torch_ops`); elsewhere `reference` does.
Legend: T tokens, K inputs, N outputs, R rank, L tokens of one use.
Source: LoRA (arXiv 2106.09685), VeRA (arXiv 2310.11454); multi-tenant batching as in Punica (arXiv 2310.18547) and
MuxTune (arXiv 2603.02885).
"""

from collections.abc import Sequence

import torch

from engine.kernels.dropout import DropoutMask
from engine.kernels.launch import SUFFIXES
from engine.kernels.multi_lora.reference import MultiLora
from engine.kernels.multi_lora.types import Operator, check


def multi_lora(x_TK: torch.Tensor, operators: Sequence[Operator]) -> tuple[torch.Tensor, ...]:
    """Return Y_i [T, N_i] of each operator, in order.

    Uses of one operator must not overlap; those of two must have the same tokens or none in common.
    Raises ValueError if shapes or ranges do not fit.
    """
    if _on_device(x_TK, operators):
        from engine.kernels.multi_lora import torch_ops  # not loaded without a GPU

        return torch_ops.run(x_TK, operators)
    check(x_TK, operators)
    flat = [tensor for operator in operators for low_rank in operator.factors for tensor in low_rank]
    result: tuple[torch.Tensor, ...] = MultiLora.apply(  # type: ignore[no-untyped-call]
        x_TK, tuple(operators), *flat
    )
    return result


def _on_device(x_TK: torch.Tensor, operators: Sequence[Operator]) -> bool:
    """Return whether the kernels run it. The reference runs float64, and masks that are not made from a dropout key."""
    if not (x_TK.is_cuda and x_TK.dtype in SUFFIXES):
        return False
    masks = [use.keep_mask for operator in operators for use in operator.uses]
    return all(mask is None or isinstance(mask, DropoutMask) for mask in masks)
