"""DoRA (arXiv 2402.09353), as PEFT computes it, for the adapters of several tasks at one operator.

    y = x W + b + (m / n - 1) * drop(x) W + (m / n) * scale * drop(x) A^T B^T,  n = ||W + scale * B A|| by output
n gets no gradient. It is computed without the dense sum:
    n^2 = ||W||^2 + 2 scale * (B A W^T) + scale^2 * (B A A^T B^T), by output: O(N K R) and no [N, K] buffer.
Without dropout, m / n is a factor of the operator's output: LoraAdapter.output_affines applies it there.

Legend: T tokens of these tasks, L of one, K inputs, N outputs, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.kernels.dropout import drop
from engine.kernels.grouped_gemm import grouped_gemm
from engine.kernels.multi_lora.types import AdapterSlice


@dataclass(frozen=True, eq=False)
class DoraParameters:
    """The parameters of one task at one operator: low-rank factors, magnitude m, and the scale of B A."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    magnitude_N: torch.Tensor
    scale: float


def outputs_with_dropout(
    weight_KN: torch.Tensor,
    tasks: Sequence[DoraParameters],
    slices: Sequence[AdapterSlice],
    x_TK: torch.Tensor,
    ys: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Return y + (m / n) (drop(x) W + scale * drop(x) A^T B^T) - drop(x) W of each task, where y is x W + b."""
    if not tasks:
        return []
    dropped = []
    for slice_ in slices:
        assert slice_.keep_mask is not None
        dropped.append(drop(x_TK[slice_.start : slice_.end], slice_.keep_mask, slice_.keep_scale))
    num_tokens, ones = [len(y_LN) for y_LN in ys], [1.0] * len(tasks)
    dropped_TK = torch.cat(dropped)
    shrunk = grouped_gemm(dropped_TK.flatten(), num_tokens, [task.a_RK for task in tasks], (), ones)
    added = grouped_gemm(shrunk, num_tokens, [task.b_NR for task in tasks], (), [task.scale for task in tasks])
    base_TN = dropped_TK @ weight_KN
    whole = torch.split(base_TN + added.view_as(base_TN), num_tokens)
    ratios = [task.magnitude_N / n_N for task, n_N in zip(tasks, weight_norms(weight_KN, tasks), strict=True)]
    parts = zip(ys, ratios, whole, torch.split(base_TN, num_tokens), strict=True)
    return [y_LN + ratio_N * whole_LN - base_LN for y_LN, ratio_N, whole_LN, base_LN in parts]


@torch.no_grad()
def weight_norms(weight_KN: torch.Tensor, tasks: Sequence[DoraParameters]) -> list[torch.Tensor]:
    """Return n [N] of each task."""
    if not tasks:
        return []
    a, b = [task.a_RK for task in tasks], [task.b_NR for task in tasks]
    weight_KN, ranks, ones = weight_KN.to(a[0].dtype), [len(a_RK) for a_RK in a], [1.0] * len(a)
    squares_N, crosses = weight_KN.square().sum(dim=0), torch.split(torch.cat(a) @ weight_KN, ranks)
    grams = grouped_gemm(torch.cat([a_RK.flatten() for a_RK in a]), ranks, a, (), ones)  # A A^T
    gram_of = [
        part.view(rank, rank) for part, rank in zip(torch.split(grams, [r * r for r in ranks]), ranks, strict=True)
    ]
    rows = grouped_gemm(torch.cat([b_NR.flatten() for b_NR in b]), [len(b_NR) for b_NR in b], gram_of, (), ones)
    rows_of = torch.split(rows, [b_NR.numel() for b_NR in b])
    norms = []
    for task, cross_RN, row in zip(tasks, crosses, rows_of, strict=True):
        b_NR = task.b_NR
        cross_N, square_N = (cross_RN.T * b_NR).sum(dim=1), (row.view_as(b_NR) * b_NR).sum(dim=1)
        norms.append((squares_N + 2 * task.scale * cross_N + task.scale**2 * square_N).sqrt())
    return norms
