"""VeRA (arXiv 2310.11454): y += b * (d * dropout(x) A^T) B^T; A and B random and frozen, shared by a task's modules.

The fused kernel adds it as a low-rank pair with gains d and b. x is not saved, because A and B need no gradient.
A and B are drawn from `projection_prng_key` as PEFT draws them, so that they are equal to PEFT's.
Legend: K inputs, N outputs, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from peft import VeraConfig

from engine.kernels.multi_lora.types import AdapterSlice, LowRank
from engine.methods import Vera
from engine.peft.adapter import Adapter, BaseOp, Tensors, adapter_slice
from engine.peft.layout import TaskSpan


class VeraAdapter(Adapter):
    """The gains b and d of one task at one operator. `a_RK` and `b_NR` are shared and fit the widest operator."""

    method: Vera
    a_RK: torch.Tensor
    b_NR: torch.Tensor

    @classmethod
    def build(cls, method: Vera, ops: Sequence[BaseOp], seed: int, tensors: Mapping[str, Tensors]) -> dict[str, Self]:
        adapters = super().build(method, ops, seed, tensors)
        generator = torch.Generator().manual_seed(method.projection_prng_key)
        device = ops[0].weight_KN.device
        a_RK = _kaiming((method.rank, max(op.in_features for op in ops)), generator).to(device)
        b_NR = _kaiming((max(op.out_features for op in ops), method.rank), generator).to(device)
        for adapter in adapters.values():
            adapter.a_RK, adapter.b_NR = a_RK, b_NR
        return adapters

    def initialise(self) -> None:
        self.tensors["vera_lambda_d"].fill_(self.method.d_initial)
        self.tensors["vera_lambda_b"].zero_()

    @property
    def frozen_tensors(self) -> Sequence[torch.Tensor]:
        return self.a_RK, self.b_NR

    def low_rank(self, span: TaskSpan, training: bool) -> tuple[AdapterSlice, LowRank]:
        a_RK, b_NR = self.a_RK[:, : self.op.in_features], self.b_NR[: self.op.out_features]
        slice_ = adapter_slice(self.op, self.seed, span, training, 1.0, self.method.dropout)
        return slice_, LowRank(a_RK, b_NR, self.tensors["vera_lambda_d"], self.tensors["vera_lambda_b"])

    @classmethod
    def config(cls, method: Vera, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> VeraConfig:
        return VeraConfig(
            r=method.rank,
            vera_dropout=method.dropout,
            d_initial=method.d_initial,
            projection_prng_key=method.projection_prng_key,
            save_projection=True,
            **common,
        )

    @classmethod
    def export_shared_tensors(cls, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
        first = adapters[0]
        assert isinstance(first, VeraAdapter)
        return {"base_model.vera_A": first.a_RK, "base_model.vera_B": first.b_NR}


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Return values uniform in +-sqrt(6 / fan in), as peft.tuners.vera.model._kaiming_init."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


ADAPTER = VeraAdapter
