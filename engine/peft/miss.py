"""MiSS (arXiv 2409.15371): y += sums(drop(x)) D; the i-th of R sums is over the columns i, i + R, i + 2R, ... of x.

As a low-rank pair it is A = (I I I ...) cut at K columns, B = D^T: the fused kernel adds it.
Legend: K inputs, N outputs, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import MissConfig

from engine.errors import InvalidInputError
from engine.kernels.multi_lora.types import AdapterSlice, LowRank
from engine.methods import Miss
from engine.peft.adapter import Adapter, BaseOp, lora_use
from engine.peft.layout import TaskSpan


class MissAdapter(Adapter):
    """D [R, N] of one task at one operator."""

    method: Miss
    a_RK: torch.Tensor

    def initialise(self) -> None:
        """D zero. Raises InvalidInputError at GPT-2's transposed linears: PEFT could not load the adapter."""
        if self.op.is_conv1d:
            raise InvalidInputError.of_field(
                "spec.miss.target_modules", f"{self.op.name} is a Conv1D: use LoRA or VeRA"
            )
        self.tensors["miss_block"].zero_()
        columns = torch.arange(self.op.in_features, device=self.op.weight_KN.device) % self.method.rank
        self.a_RK = torch.nn.functional.one_hot(columns, self.method.rank).T.float()

    @property
    def frozen(self) -> Sequence[torch.Tensor]:
        return (self.a_RK,)

    def low_rank(self, span: TaskSpan, training: bool) -> tuple[AdapterSlice, LowRank]:
        use = lora_use(self.op, self.seed, span, training, 1.0, self.method.dropout)
        return use, LowRank(self.a_RK, self.tensors["miss_block"].T)

    @classmethod
    def config(cls, method: Miss, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> MissConfig:
        fields = {name: value for name, value in common.items() if name != "fan_in_fan_out"}
        return MissConfig(r=method.rank, miss_dropout=method.dropout, **fields)


ADAPTER = MissAdapter
