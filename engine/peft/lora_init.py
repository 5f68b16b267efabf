"""Low-rank factors of a frozen weight, W ~ B A, from which LoRA may start. Legend: K inputs, N outputs, R rank."""

import torch

from engine.peft.seeded_init import generator_of

_NUM_ITERATIONS = 8


def principal_factors(weight_KN: torch.Tensor, rank: int, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PiSSA's A [R, K] and B [N, R], each scaled by the roots of the R largest singular values.

    Source: arXiv 2404.02948, equation 2. Computed by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4)
    from a random start that depends on `key`: a full decomposition of a large backbone would block all other tasks for
    minutes.
    """
    weight_NK = weight_KN.T.float()
    num_columns = min(rank + max(16, rank), *weight_NK.shape)
    start = torch.empty(weight_NK.shape[1], num_columns).normal_(generator=generator_of(0, key)).to(weight_NK.device)
    basis, _ = torch.linalg.qr(weight_NK @ start)
    for _ in range(_NUM_ITERATIONS):
        other, _ = torch.linalg.qr(weight_NK.T @ basis)
        basis, _ = torch.linalg.qr(weight_NK @ other)
    left, values, right = torch.linalg.svd(basis.T @ weight_NK, full_matrices=False)
    root_R = values[:rank].sqrt()
    return root_R[:, None] * right[:rank], (basis @ left[:, :rank]) * root_R


def orthonormal_factors(weight_KN: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return OLoRA's A [R, K] and orthonormal B [N, R]: the first R rows and columns of W = QR (arXiv 2406.01775)."""
    weight_NK = weight_KN.T.float()
    b_NR, _ = torch.linalg.qr(weight_NK[:, :rank])  # Q's first columns depend on W's first alone
    return b_NR.T @ weight_NK, b_NR
