"""LoRA (arXiv 2106.09685): y += scale * dropout(x) A^T B^T, initialised as PEFT does: A uniform, B zero.

With a magnitude m (DoRA), each output of y is rescaled: engine.peft.dora.

PiSSA and OLoRA start from factors A0, B0 of the weight, and W - scale * B0 A0 would be the frozen part. As tasks share
W, the task adds scale * x [A; A0]^T [B, -B0]^T instead, and is exported so, as LoRA of rank 2 R.

Legend: T tokens of the stream, L of one span, K inputs, N outputs, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig

from engine.kernels.multi_lora.types import AdapterSlice, LowRank
from engine.methods import Lora, LoraInit
from engine.peft.adapter import Adapter, Affine, BaseOp, Tensors, adapter_slice
from engine.peft.dora import DoraParameters, outputs_with_dropout, weight_norms
from engine.peft.layout import TaskSpan
from engine.peft.lora_init import orthonormal_factors, principal_factors
from engine.peft.seeded_init import uniform_
from engine.peft.selective import VectorCopy, affines


class LoraAdapter(Adapter):
    """A and B of one task at one operator; where the method trains biases, also at modules without A and B."""

    method: Lora

    def __init__(self, method: Lora, op: BaseOp, seed: int, tensors: Tensors) -> None:
        super().__init__(method, op, seed, tensors)
        self.scale = method.scale_of(op.name)
        self.bias = VectorCopy(op, self.tensors) if "bias" in self.tensors else None
        self.dora: DoraParameters | None = None
        if "lora_magnitude_vector" in self.tensors:
            a_RK, b_NR, magnitude_N = (self.tensors[name] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
            self.dora = DoraParameters(a_RK, b_NR, magnitude_N, self.scale)
        self.initial: dict[str, torch.Tensor] = {}  # A0 and B0, for PiSSA and OLoRA

    def initialise(self) -> None:
        """Initialise A uniform in +-1/sqrt(K) (kaiming_uniform with a = sqrt(5), as PEFT), B zero, m the norms of W.

        PiSSA and OLoRA: A and B are factors of the weight, such that scale * B A is a part of it.
        """
        if "lora_A" in self.tensors and self.method.starts_from_weights:
            self._start_from_weight()
        elif "lora_A" in self.tensors:
            uniform_(self.tensors["lora_A"], 1 / math.sqrt(self.op.in_features), self.seed, f"{self.op.name}/lora_A")
            self.tensors["lora_B"].zero_()
        if self.dora is not None:
            self.dora.magnitude_N.copy_(self.op.weight_KN.float().norm(dim=0))
        if self.bias is not None:
            self.bias.initialise()

    def low_rank(self, span: TaskSpan, training: bool) -> tuple[AdapterSlice, LowRank] | None:
        if "lora_A" not in self.tensors or self._is_dora_with_dropout(training):
            return None
        slice_ = adapter_slice(self.op, self.seed, span, training, self.scale, self.method.dropout)
        return slice_, LowRank(*self._factors())

    def _start_from_weight(self) -> None:
        rank, weight_KN = len(self.tensors["lora_A"]), self.op.weight_KN
        if self.method.init is LoraInit.PISSA:
            a_RK, b_NR = principal_factors(weight_KN, rank, self.op.name)
            a_RK, b_NR = a_RK / math.sqrt(self.scale), b_NR / math.sqrt(self.scale)
        else:
            a_RK, b_NR = orthonormal_factors(weight_KN, rank)  # as PEFT: scale * B A is taken off W, not B A
        self.tensors["lora_A"].copy_(a_RK)
        self.tensors["lora_B"].copy_(b_NR)
        self.initial = {"initial_A": a_RK, "initial_B": b_NR}

    @property
    def frozen_tensors(self) -> Sequence[torch.Tensor]:
        return tuple(self.initial.values())

    @property
    def started_from(self) -> Tensors:
        return self.initial

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B; for PiSSA and OLoRA [A; A0] and [B, -B0]."""
        a_RK, b_NR = self.tensors["lora_A"], self.tensors["lora_B"]
        if not self.initial:
            return a_RK, b_NR
        return torch.cat([a_RK, self.initial["initial_A"]]), torch.cat([b_NR, -self.initial["initial_B"]], dim=1)

    def changes_output(self, training: bool) -> bool:
        return self._is_dora_with_dropout(training) or not (self.bias is None or self.bias.is_affine)

    def _is_dora_with_dropout(self, training: bool) -> bool:
        """Return whether the magnitude scales drop(x) W, which the operator's own x W does not contain."""
        return self.dora is not None and training and self.method.dropout > 0

    @classmethod
    def change_outputs(
        cls,
        uses: Sequence[tuple[TaskSpan, "LoraAdapter"]],
        x_TK: torch.Tensor,
        ys: Sequence[torch.Tensor],
        training: bool,
    ) -> Sequence[torch.Tensor]:
        """Apply DoRA with dropout to all its tasks in a few products, and run a norm again for a bias that needs it."""
        changed, at, tasks, slices = list(ys), list[int](), list[DoraParameters](), list[AdapterSlice]()
        for i, (span, adapter) in enumerate(uses):
            if adapter.dora is not None and adapter._is_dora_with_dropout(training):
                at.append(i)
                tasks.append(adapter.dora)
                dropout = adapter.method.dropout
                slices.append(adapter_slice(adapter.op, adapter.seed, span, training, adapter.scale, dropout))
        outputs = outputs_with_dropout(uses[0][1].op.weight_KN, tasks, slices, x_TK, [ys[i] for i in at])
        for i, output_LN in zip(at, outputs, strict=True):
            changed[i] = output_LN
        for i, (span, adapter) in enumerate(uses):
            if adapter.bias is not None and not adapter.bias.is_affine:
                changed[i] = adapter.bias.apply(x_TK[span.start : span.end], ys[i])
        return changed

    @classmethod
    def output_affines(cls, adapters: Sequence["LoraAdapter"], training: bool) -> list[Affine | None]:
        """Return m / n where y is x W + b + scale * x A^T B^T already, and the task's own bias."""
        scaled = [a.dora for a in adapters if a.dora is not None and not a._is_dora_with_dropout(training)]
        norms = weight_norms(adapters[0].op.weight_KN, scaled)
        ratio_of = {id(dora): dora.magnitude_N / norms_N for dora, norms_N in zip(scaled, norms, strict=True)}
        biased = [adapter for adapter in adapters if adapter.bias is not None]
        biases = affines([adapter.bias for adapter in biased if adapter.bias is not None])
        bias_of = {id(adapter): affine for adapter, affine in zip(biased, biases, strict=True)}
        return [adapter._affine(ratio_of.get(id(adapter.dora)), bias_of.get(id(adapter))) for adapter in adapters]

    def _affine(self, ratio_N: torch.Tensor | None, bias: Affine | None) -> Affine | None:
        if ratio_N is None:
            return bias
        op_bias_N = self.op.bias_N
        shift_N = None if op_bias_N is None else op_bias_N - ratio_N * op_bias_N
        if bias is not None and bias.shift_N is not None:
            shift_N = bias.shift_N if shift_N is None else shift_N + bias.shift_N
        return Affine(ratio_N, shift_N)

    @classmethod
    def config(cls, method: Lora, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> LoraConfig:
        ranks, alphas = (1, 1.0) if not method.starts_from_weights else (2, math.sqrt(2) if method.use_rslora else 2.0)
        return LoraConfig(
            r=ranks * method.rank,
            lora_alpha=alphas * method.alpha,
            lora_dropout=method.dropout,
            use_rslora=method.use_rslora,
            use_dora=method.use_dora,
            rank_pattern={key: ranks * rank for key, rank in method.rank_pattern.items()},
            alpha_pattern={key: alphas * alpha for key, alpha in method.alpha_pattern.items()},
            bias=method.bias.value,
            **common,
        )

    def export_tensors(self, in_peft: bool) -> dict[str, torch.Tensor]:
        names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
        names["bias"] = "base_layer.bias" if "lora_A" in self.tensors else "bias"
        tensors = dict(self.tensors)
        if self.initial:
            tensors["lora_A"], tensors["lora_B"] = self._factors()
        return {names[name]: tensor for name, tensor in tensors.items()}

    @property
    def is_target(self) -> bool:
        return "lora_A" in self.tensors


ADAPTER = LoraAdapter
