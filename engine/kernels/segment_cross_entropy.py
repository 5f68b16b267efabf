"""Loss and gradient at target positions only, from one chunk of logits at a time.

    z = softcap(H Wt + b);   loss_m = logsumexp(z_m) - z_m[target_m];   dH = weight_m (softmax(z_m) - onehot) Wt^T

The head is frozen, so the gradient is computed beside the loss with no recomputation and no graph. A row's values
depend on that row alone. Legend: M target rows, H hidden, V vocabulary, C rows of a chunk.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from engine.kernels import cupy_launcher
from engine.kernels.constants import SEGMENT_CROSS_ENTROPY_BLOCKS
from engine.kernels.launch import POINTER, SUFFIXES, Kernel, Launcher, pack, struct_of
from engine.kernels.packed_weight import PackedWeight
from engine.planning.cost.memory_model import CHUNK_LOGITS

LAUNCH = struct_of(
    [(name, POINTER) for name in ("logits", "targets", "weights", "losses")]
    + [("stride", np.int64), ("num_rows", np.int32), ("vocabulary", np.int32)]
    + [("softcap", np.float32), ("unused", np.int32)]
)


@dataclass(frozen=True)
class OutputHead:
    """The frozen output head. `softcap` bounds logits as Gemma 2 does (c * tanh(z / c)); None: no bound."""

    linear: nn.Linear
    softcap: float | None = None
    packed: PackedWeight | None = None

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """Return logits [C, V] in float32 (float64 stays)."""
        if self.packed is not None:
            z_CV = self.packed.times(hidden_CH, self.linear.bias)
        else:
            z_CV = nn.functional.linear(hidden_CH, self.linear.weight, self.linear.bias)
        z_CV = z_CV.to(torch.promote_types(z_CV.dtype, torch.float32))
        return z_CV if self.softcap is None else self.softcap * torch.tanh(z_CV / self.softcap)

    def gradient(self, dz_CV: torch.Tensor) -> torch.Tensor:
        """Return dZ W [C, H], without the slope of the softcap."""
        weight_VH = self.linear.weight
        return dz_CV.to(weight_VH.dtype) @ weight_VH if self.packed is None else self.packed.gradient(dz_CV)


@torch.no_grad()
def segment_cross_entropy(
    head: OutputHead, hidden_MH: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (loss of each row [M], gradient of sum(weights * loss) by the hidden rows [M, H]).

    Without weights the gradient is None.
    """
    num_rows = max(1, CHUNK_LOGITS // head.linear.weight.shape[0])
    losses, gradients = [], []
    for start in range(0, hidden_MH.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        run = _by_kernel if hidden_MH.is_cuda and hidden_MH.dtype in SUFFIXES else _by_torch
        loss_C, dhidden_CH = run(head, hidden_MH[rows], targets_M[rows], weights_M, rows)
        losses.append(loss_C)
        gradients += [] if dhidden_CH is None else [dhidden_CH]
    if not losses:
        return hidden_MH.new_zeros(0), None if weights_M is None else torch.zeros_like(hidden_MH)
    return torch.cat(losses), torch.cat(gradients).to(hidden_MH.dtype) if gradients else None


def _by_kernel(
    head: OutputHead, hidden_CH: torch.Tensor, targets_C: torch.Tensor, weights_M: torch.Tensor | None, rows: slice
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (losses, gradient by the hidden rows). Logits, in the head's type, become their own gradient."""
    z_CV = nn.functional.linear(hidden_CH, head.linear.weight, head.linear.bias)
    weights_C = None if weights_M is None else weights_M[rows]
    losses_C = logits_gradient_(cupy_launcher.launcher_of(z_CV.device), z_CV, targets_C, weights_C, head.softcap)
    return losses_C, None if weights_C is None else z_CV @ head.linear.weight


def logits_gradient_(
    launcher: Launcher,
    z_CV: torch.Tensor,
    targets_C: torch.Tensor,
    weights_C: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return losses [C] in float32 of logits in the head's type; with weights, `z_CV` becomes its own gradient.

    Reads the logits twice and writes them once. Raises ValueError if rows are not contiguous or sizes differ.
    """
    if z_CV.stride(1) != 1 or len(targets_C) != len(z_CV) or (weights_C is not None and len(weights_C) != len(z_CV)):
        raise ValueError(
            f"logits {tuple(z_CV.shape)} of strides {z_CV.stride()} do not fit {len(targets_C)} targets and the weights"
        )
    targets_C, losses_C = targets_C.long().contiguous(), z_CV.new_empty(len(z_CV), dtype=torch.float32)
    weights_C = None if weights_C is None else weights_C.float().contiguous()
    if len(z_CV):
        struct = pack(
            LAUNCH, logits=z_CV, targets=targets_C, weights=weights_C, losses=losses_C, stride=z_CV.stride(0),
            num_rows=len(z_CV), vocabulary=z_CV.shape[1], softcap=softcap or 0.0, unused=0,
        )  # fmt: skip
        kernel = Kernel("segment_cross_entropy.cu", f"segment_cross_entropy_{SUFFIXES[z_CV.dtype]}")
        num_blocks = min(len(z_CV), SEGMENT_CROSS_ENTROPY_BLOCKS * launcher.num_multiprocessors)
        pointed = [t for t in (z_CV, targets_C, weights_C, losses_C) if t is not None]
        launcher.launch(kernel, num_blocks, 64, struct, [], pointed)
    return losses_C


def _by_torch(
    head: OutputHead, hidden_CH: torch.Tensor, targets_C: torch.Tensor, weights_M: torch.Tensor | None, rows: slice
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the same by torch: logits become exponentials, then their own gradient, in place."""
    z_CV, target_C1 = head.logits(hidden_CH), targets_C.long().unsqueeze(1)
    slope_CV = None if head.softcap is None or weights_M is None else 1 - (z_CV / head.softcap) ** 2
    z_CV.sub_(z_CV.amax(dim=1, keepdim=True))
    target_logit_C1 = z_CV.gather(1, target_C1)
    sum_C1 = z_CV.exp_().sum(dim=1, keepdim=True)
    loss_C = (sum_C1.log() - target_logit_C1).squeeze(1)
    if weights_M is None:
        return loss_C, None
    weights_C1 = weights_M[rows].to(z_CV.dtype).unsqueeze(1)
    dz_CV = z_CV.mul_(weights_C1 / sum_C1).scatter_add_(1, target_C1, -weights_C1)
    if slope_CV is not None:
        dz_CV.mul_(slope_CV)
    return loss_C, head.gradient(dz_CV)
