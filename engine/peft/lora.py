"""LoRA (arXiv 2106.09685): y += (alpha / rank) * dropout(x) A^T B^T, initialised as PEFT does: A uniform, B zero.

Legend: T tokens, K inputs, N outputs, R rank.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch

from engine.kernels.dropout import keep_mask, keep_scale
from engine.kernels.multi_lora import LoraUse, multi_lora
from engine.peft.adapter import Adapter, BaseOp
from engine.peft.layout import TaskSpan
from engine.task import Lora


def shapes(method: Lora, op: BaseOp) -> dict[str, tuple[int, int]]:
    """Names and shapes of the method's parameters at `op`, as PEFT names them."""
    return {"lora_A": (method.rank, op.in_features), "lora_B": (op.out_features, method.rank)}


@torch.no_grad()
def initialise(method: Lora, op: BaseOp, seed: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """A uniform in +-1/sqrt(K) (kaiming_uniform with a = sqrt(5), as PEFT), keyed by (task seed, operator); B zero."""
    digest = hashlib.sha256(f"{seed}/{op.name}/lora_A".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(op.in_features)
    fresh = torch.empty(tensors["lora_A"].shape).uniform_(-bound, bound, generator=generator)
    tensors["lora_A"].copy_(fresh)
    tensors["lora_B"].zero_()


class LoraAdapter(Adapter):
    """A and B of one task at one operator."""

    def __init__(self, method: Lora, seed: int, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.scale = method.alpha / method.rank
        self.dropout = method.dropout
        self.seed = seed

    @classmethod
    def aggregate(
        cls, op: BaseOp, x_TK: torch.Tensor, uses: Sequence[tuple[TaskSpan, Adapter]], training: bool
    ) -> torch.Tensor:
        loras = [(span, cast(LoraAdapter, adapter)) for span, adapter in uses]
        factors = [lora.tensors[name] for _, lora in loras for name in ("lora_A", "lora_B")]
        return multi_lora(
            x_TK, op.weight_KN, op.bias_N, [lora._use(op, span, training) for span, lora in loras], factors
        )

    def _use(self, op: BaseOp, span: TaskSpan, training: bool) -> LoraUse:
        if not training or self.dropout == 0:
            return LoraUse(span.start, span.end, self.scale)

        def mask() -> torch.Tensor:
            kept = keep_mask(self.seed, span.step, op.site, span.positions_L, op.in_features, self.dropout)
            return kept.to(op.weight_KN.device)

        return LoraUse(span.start, span.end, self.scale, mask, keep_scale(self.dropout))
