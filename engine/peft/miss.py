"""MiSS (arXiv 2409.15371): y += sums(drop(x)) D; the i-th of R sums is over the columns i, i + R, i + 2R, ... of x.

The fused kernel adds it as a low-rank pair: A = (I I I ...) cut at K columns, B = D^T.
Legend: K inputs, N outputs, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import MissConfig

from engine.errors import InvalidInputError
from engine.kernels.multi_lora.types import AdapterSlice, LowRank
from engine.methods import Miss
from engine.peft.adapter import Adapter, BaseOp, adapter_slice
from engine.peft.layout import TaskSpan


class MissAdapter(Adapter):
    """The matrix D [R, N] of one task at one operator."""

    method: Miss
    a_RK: torch.Tensor

    def initialise(self) -> None:
        """Set D to zero. Raises InvalidInputError at GPT-2's transposed linears: PEFT could not load the adapter."""
        if self.op.is_conv1d:
            raise InvalidInputError.of_field(
                "spec.miss.target_modules",
                f"{self.op.name} is a Conv1D, which PEFT's MiSS cannot adapt: use lora or vera",
            )
        self.tensors["miss_block"].zero_()
        columns = torch.arange(self.op.in_features, device=self.op.weight_KN.device) % self.method.rank
        self.a_RK = torch.nn.functional.one_hot(columns, self.method.rank).T.float()

    @property
    def frozen_tensors(self) -> Sequence[torch.Tensor]:
        return (self.a_RK,)

    def low_rank(self, span: TaskSpan, training: bool) -> tuple[AdapterSlice, LowRank]:
        slice_ = adapter_slice(self.op, self.seed, span, training, 1.0, self.method.dropout)
        return slice_, LowRank(self.a_RK, self.tensors["miss_block"].T)

    @classmethod
    def config(cls, method: Miss, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> MissConfig:
        fields = {name: value for name, value in common.items() if name != "fan_in_fan_out"}
        return MissConfig(r=method.rank, miss_dropout=method.dropout, **fields)


ADAPTER = MissAdapter
