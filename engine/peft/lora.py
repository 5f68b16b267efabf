"""LoRA (arXiv 2106.09685): y += scale * dropout(x) A^T B^T, initialised as PEFT does: A uniform, B zero.

With a magnitude m (DoRA, arXiv 2402.09353), as PEFT computes it:
    y = x W + b + (m / n - 1) * drop(x) W + (m / n) * scale * drop(x) A^T B^T,  n = ||W + scale * B A|| by output
where n bears no gradient. n is never computed from the dense sum:
    n^2 = ||W||^2 + 2 scale * (B A W^T) + scale^2 * (B A A^T B^T), by output: O(N K R) and no [N, K] buffer.

Legend: L tokens of one span, K inputs, N outputs, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig

from engine.kernels.dropout import drop
from engine.kernels.multi_lora import LoraUse, LowRank
from engine.methods import Lora
from engine.peft.adapter import Adapter, BaseOp, Tensors, lora_use
from engine.peft.drawing import uniform_
from engine.peft.layout import TaskSpan
from engine.peft.selective import VectorCopy


class LoraAdapter(Adapter):
    """A and B of one task at one operator; where the method trains biases, also at modules without A and B."""

    method: Lora

    def __init__(self, method: Lora, op: BaseOp, seed: int, tensors: Tensors) -> None:
        super().__init__(method, op, seed, tensors)
        self.scale = method.scale_of(op.name)
        self.bias = VectorCopy(op, self.tensors) if "bias" in self.tensors else None
        self.magnitude_N = self.tensors.get("lora_magnitude_vector")

    def initialise(self) -> None:
        """A uniform in +-1/sqrt(K) (kaiming_uniform with a = sqrt(5), as PEFT); B zero; the magnitude W's own norms."""
        if "lora_A" in self.tensors:
            uniform_(self.tensors["lora_A"], 1 / math.sqrt(self.op.in_features), self.seed, f"{self.op.name}/lora_A")
            self.tensors["lora_B"].zero_()
        if self.magnitude_N is not None:
            self.magnitude_N.copy_(self.op.weight_KN.float().norm(dim=0))
        if self.bias is not None:
            self.bias.initialise()

    def low_rank(self, span: TaskSpan, training: bool) -> tuple[LoraUse, LowRank] | None:
        drops = training and self.method.dropout > 0
        if "lora_A" not in self.tensors or (drops and self.magnitude_N is not None):
            return None
        use = lora_use(self.op, self.seed, span, training, self.scale, self.method.dropout)
        return use, LowRank(self.tensors["lora_A"], self.tensors["lora_B"])

    @property
    def rewrites_output(self) -> bool:
        return self.bias is not None or self.magnitude_N is not None

    def after(self, x_LK: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        if self.magnitude_N is not None:
            y_LN = self._with_magnitude(x_LK, y_LN, span, training)
        return y_LN if self.bias is None else self.bias.apply(x_LK, y_LN)

    def _with_magnitude(self, x_LK: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        """Without dropout y is x W + b + scale * x A^T B^T so far; with it x W + b, and drop(x) W is run beside."""
        assert self.magnitude_N is not None
        ratio_N = (self.magnitude_N / self._norms()).to(y_LN.dtype)
        use = lora_use(self.op, self.seed, span, training, self.scale, self.method.dropout)
        if use.keep_mask is None:
            bias_N = 0 if self.op.bias_N is None else self.op.bias_N
            return (y_LN - bias_N) * ratio_N + bias_N
        dropped_LK = drop(x_LK, use.keep_mask, use.keep_scale)
        a_RK, b_NR = (self.tensors[name].to(x_LK.dtype) for name in ("lora_A", "lora_B"))
        base_LN, low_rank_LN = dropped_LK @ self.op.weight_KN, self.scale * (dropped_LK @ a_RK.T) @ b_NR.T
        return y_LN + ratio_N * (base_LN + low_rank_LN) - base_LN

    @torch.no_grad()
    def _norms(self) -> torch.Tensor:
        a_RK, b_NR = self.tensors["lora_A"], self.tensors["lora_B"]
        weight_KN = self.op.weight_KN.to(a_RK.dtype)
        cross_N = ((a_RK @ weight_KN).T * b_NR).sum(dim=1)
        square_N = ((b_NR @ (a_RK @ a_RK.T)) * b_NR).sum(dim=1)
        squares_N = weight_KN.square().sum(dim=0) + 2 * self.scale * cross_N + self.scale**2 * square_N
        return squares_N.sqrt()

    @classmethod
    def config(cls, method: Lora, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> LoraConfig:
        return LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            use_rslora=method.use_rslora,
            use_dora=method.use_dora,
            rank_pattern=dict(method.rank_pattern),
            alpha_pattern=dict(method.alpha_pattern),
            bias=method.bias.value,
            **common,
        )

    def exported(self, in_peft: bool) -> dict[str, torch.Tensor]:
        names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
        names["bias"] = "base_layer.bias" if "lora_A" in self.tensors else "bias"
        return {names[name]: tensor for name, tensor in self.tensors.items()}

    @property
    def is_target(self) -> bool:
        return "lora_A" in self.tensors


ADAPTER = LoraAdapter
