"""Loss and gradient of the target positions only, from chunks of logits: never all logits at once.

    z = softcap(H Wt + b);   loss_m = logsumexp(z_m) - z_m[target_m];   dH = weight_m (softmax(z_m) - onehot) Wt^T

The head is frozen, so the gradient is computed beside the loss with no recomputation and no graph. A row's values
depend on that row alone. Legend: M target rows, H hidden, V vocabulary, C rows of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import nn

_CHUNK_LOGITS = 1 << 24  # elements of one chunk of logits: 64 MiB in float32


@dataclass(frozen=True)
class Head:
    """The frozen output head: `softcap` bounds logits as Gemma 2 does (c * tanh(z / c)); None: as they are."""

    linear: nn.Linear
    softcap: float | None = None

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """[C, V] in float32 (float64 stays)."""
        z_CV = nn.functional.linear(hidden_CH, self.linear.weight, self.linear.bias)
        z_CV = z_CV.to(torch.promote_types(z_CV.dtype, torch.float32))
        return z_CV if self.softcap is None else self.softcap * torch.tanh(z_CV / self.softcap)


@torch.no_grad()
def segment_cross_entropy(
    head: Head, hidden_MH: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(loss by row [M], gradient of sum(weights * loss) by the hidden rows [M, H]; None if weights is None)."""
    num_rows = max(1, _CHUNK_LOGITS // head.linear.weight.shape[0])
    losses, gradients = [], []
    for start in range(0, hidden_MH.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        z_CV = head.logits(hidden_MH[rows])
        target_C1 = targets_M[rows].long().unsqueeze(1)
        normaliser_C1 = torch.logsumexp(z_CV, dim=1, keepdim=True)
        losses.append((normaliser_C1 - z_CV.gather(1, target_C1)).squeeze(1))
        if weights_M is not None:
            gradients.append(_hidden_gradient(head, z_CV, normaliser_C1, target_C1, weights_M[rows]))
    if not losses:
        return hidden_MH.new_zeros(0), None if weights_M is None else torch.zeros_like(hidden_MH)
    return torch.cat(losses), torch.cat(gradients).to(hidden_MH.dtype) if gradients else None


def _hidden_gradient(
    head: Head, z_CV: torch.Tensor, normaliser_C1: torch.Tensor, target_C1: torch.Tensor, weights_C: torch.Tensor
) -> torch.Tensor:
    slope_CV = None if head.softcap is None else 1 - (z_CV / head.softcap) ** 2
    dz_CV = z_CV.sub_(normaliser_C1).exp_()  # in place: the logits are not needed any more
    dz_CV.scatter_add_(1, target_C1, torch.full_like(normaliser_C1, -1.0))
    dz_CV.mul_(weights_C.to(dz_CV.dtype).unsqueeze(1))
    if slope_CV is not None:
        dz_CV.mul_(slope_CV)
    weight_VH = head.linear.weight
    return dz_CV.to(weight_VH.dtype) @ weight_VH
