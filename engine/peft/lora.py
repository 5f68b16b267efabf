"""LoRA (arXiv 2106.09685): y += scale * dropout(x) A^T B^T, initialised as PEFT does: A uniform, B zero.

With a magnitude m (DoRA), y is scaled by output: engine.peft.dora.

Started from the weight's own factors A0, B0 (PiSSA, OLoRA), W - scale * B0 A0 would be the frozen part. As W is shared,
the task adds scale * x [A; A0]^T [B, -B0]^T instead, and is exported so, as LoRA of rank 2 R.

Legend: T tokens of the stream, L of one span, K inputs, N outputs, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig

from engine.kernels.multi_lora.types import AdapterSlice, LowRank
from engine.methods import Lora, LoraInit
from engine.peft.adapter import Adapter, Affine, BaseOp, Tensors, lora_use
from engine.peft.dora import scaled_beside, weight_norms
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
        self.magnitude_N = self.tensors.get("lora_magnitude_vector")
        self.initial: dict[str, torch.Tensor] = {}  # A and B it started from, where they were the weight's own

    def initialise(self) -> None:
        """A uniform in +-1/sqrt(K) (kaiming_uniform with a = sqrt(5), as PEFT); B zero; the magnitude W's own norms.

        Or the weight's own factors, such that scale * B A is its part.
        """
        if "lora_A" in self.tensors and self.method.starts_from_weights:
            self._start_from_weight()
        elif "lora_A" in self.tensors:
            uniform_(self.tensors["lora_A"], 1 / math.sqrt(self.op.in_features), self.seed, f"{self.op.name}/lora_A")
            self.tensors["lora_B"].zero_()
        if self.magnitude_N is not None:
            self.magnitude_N.copy_(self.op.weight_KN.float().norm(dim=0))
        if self.bias is not None:
            self.bias.initialise()

    def low_rank(self, span: TaskSpan, training: bool) -> tuple[AdapterSlice, LowRank] | None:
        drops = training and self.method.dropout > 0
        if "lora_A" not in self.tensors or (drops and self.magnitude_N is not None):
            return None
        use = lora_use(self.op, self.seed, span, training, self.scale, self.method.dropout)
        return use, LowRank(*self._factors())

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
    def frozen(self) -> Sequence[torch.Tensor]:
        return tuple(self.initial.values())

    @property
    def started_from(self) -> Tensors:
        return self.initial

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a_RK, b_NR = self.tensors["lora_A"], self.tensors["lora_B"]
        if not self.initial:
            return a_RK, b_NR
        return torch.cat([a_RK, self.initial["initial_A"]]), torch.cat([b_NR, -self.initial["initial_B"]], dim=1)

    def changes_output(self, training: bool) -> bool:
        return self._drops_beside(training) or not (self.bias is None or self.bias.is_affine)

    def _drops_beside(self, training: bool) -> bool:
        """Whether what the magnitude scales has dropout, which the operator's own x W has not."""
        return self.magnitude_N is not None and training and self.method.dropout > 0

    @classmethod
    def after_all(
        cls,
        uses: Sequence[tuple[TaskSpan, "LoraAdapter"]],
        x_TK: torch.Tensor,
        ys: Sequence[torch.Tensor],
        training: bool,
    ) -> Sequence[torch.Tensor]:
        """Magnitudes with dropout, in products of all tasks; a norm's bias where it must be run again."""
        changed = list(ys)
        scaled = [i for i, (_, adapter) in enumerate(uses) if adapter._drops_beside(training)]
        for i, piece in zip(
            scaled, scaled_beside([uses[i] for i in scaled], x_TK, [ys[i] for i in scaled]), strict=True
        ):
            changed[i] = piece
        for i, (span, adapter) in enumerate(uses):
            if adapter.bias is not None and not adapter.bias.is_affine:
                changed[i] = adapter.bias.apply(x_TK[span.start : span.end], ys[i])
        return changed

    @classmethod
    def output_affines(cls, adapters: Sequence["LoraAdapter"], training: bool) -> list[Affine | None]:
        """The magnitude's ratio, where y is x W + b + scale * x A^T B^T by now, and the task's own bias."""
        scaled = [a for a in adapters if a.magnitude_N is not None and not a._drops_beside(training)]
        norms = {id(adapter): norms_N for adapter, norms_N in zip(scaled, weight_norms(scaled), strict=True)}
        biased = [adapter for adapter in adapters if adapter.bias is not None]
        biases = affines([adapter.bias for adapter in biased if adapter.bias is not None])
        own = {id(adapter): affine for adapter, affine in zip(biased, biases, strict=True)}
        return [adapter._affine(norms.get(id(adapter)), own.get(id(adapter))) for adapter in adapters]

    def _affine(self, norms_N: torch.Tensor | None, own: Affine | None) -> Affine | None:
        if norms_N is None:
            return own
        assert self.magnitude_N is not None
        gain_N, bias_N = self.magnitude_N / norms_N, self.op.bias_N
        shift_N = None if bias_N is None else bias_N - gain_N * bias_N
        if own is not None and own.shift_N is not None:
            shift_N = own.shift_N if shift_N is None else shift_N + own.shift_N
        return Affine(gain_N, shift_N)

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

    def exported(self, in_peft: bool) -> dict[str, torch.Tensor]:
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
