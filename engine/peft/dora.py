"""The magnitude of DoRA (arXiv 2402.09353), as PEFT computes it, for all tasks at one operator.

    y = x W + b + (m / n - 1) * drop(x) W + (m / n) * scale * drop(x) A^T B^T,  n = ||W + scale * B A|| by output
where n bears no gradient. n is never computed from the dense sum:
    n^2 = ||W||^2 + 2 scale * (B A W^T) + scale^2 * (B A A^T B^T), by output: O(N K R) and no [N, K] buffer.
Without dropout that is a factor of the output: LoraAdapter.output_affines.

Legend: T tokens of these tasks, L of one, K inputs, N outputs, R rank.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.kernels.dropout import drop
from engine.kernels.grouped_gemm import grouped_gemm
from engine.peft.adapter import lora_use
from engine.peft.layout import TaskSpan

if TYPE_CHECKING:
    from engine.peft.lora import LoraAdapter


def scaled_beside(
    uses: Sequence[tuple[TaskSpan, "LoraAdapter"]], x_TK: torch.Tensor, ys: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """y + (m / n) (drop(x) W + scale * drop(x) A^T B^T) - drop(x) W, where y is x W + b."""
    if not uses:
        return []
    adapters, dropped = [adapter for _, adapter in uses], []
    for span, adapter in uses:
        use = lora_use(adapter.op, adapter.seed, span, True, adapter.scale, adapter.method.dropout)
        assert use.keep_mask is not None
        dropped.append(drop(x_TK[span.start : span.end], use.keep_mask, use.keep_scale))
    num_tokens, ones = [len(y) for y in ys], [1.0] * len(uses)
    dropped_TK = torch.cat(dropped)
    factors = ([adapter.tensors[name] for adapter in adapters] for name in ("lora_A", "lora_B"))
    shrunk = grouped_gemm(dropped_TK.flatten(), num_tokens, next(factors), (), ones)
    added = grouped_gemm(shrunk, num_tokens, next(factors), (), [adapter.scale for adapter in adapters])
    base_TN = dropped_TK @ adapters[0].op.weight_KN
    whole = torch.split(base_TN + added.view_as(base_TN), num_tokens)
    norms = weight_norms(adapters)
    ratios = [adapter.tensors["lora_magnitude_vector"] / n_N for adapter, n_N in zip(adapters, norms, strict=True)]
    parts = zip(ys, ratios, whole, torch.split(base_TN, num_tokens), strict=True)
    return [y_LN + ratio_N * whole_LN - base_LN for y_LN, ratio_N, whole_LN, base_LN in parts]


@torch.no_grad()
def weight_norms(adapters: Sequence["LoraAdapter"]) -> list[torch.Tensor]:
    """n [N] of each of these adapters at one operator."""
    if not adapters:
        return []
    a, b = ([adapter.tensors[name] for adapter in adapters] for name in ("lora_A", "lora_B"))
    weight_KN, ranks, ones = adapters[0].op.weight_KN.to(a[0].dtype), [len(a_RK) for a_RK in a], [1.0] * len(a)
    squares_N, crosses = weight_KN.square().sum(dim=0), torch.split(torch.cat(a) @ weight_KN, ranks)
    grams = grouped_gemm(torch.cat([a_RK.flatten() for a_RK in a]), ranks, a, (), ones)  # A A^T
    gram_of = [
        part.view(rank, rank) for part, rank in zip(torch.split(grams, [r * r for r in ranks]), ranks, strict=True)
    ]
    rows = grouped_gemm(torch.cat([b_NR.flatten() for b_NR in b]), [len(b_NR) for b_NR in b], gram_of, (), ones)
    rows_of = torch.split(rows, [b_NR.numel() for b_NR in b])
    norms = []
    for adapter, b_NR, cross_RN, row in zip(adapters, b, crosses, rows_of, strict=True):
        cross_N, square_N = (cross_RN.T * b_NR).sum(dim=1), (row.view_as(b_NR) * b_NR).sum(dim=1)
        norms.append((squares_N + 2 * adapter.scale * cross_N + adapter.scale**2 * square_N).sqrt())
    return norms
