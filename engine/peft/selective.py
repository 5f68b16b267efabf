"""Training of the backbone's own vectors: norm weights and biases (BitFit, arXiv 2106.10199; LN tuning, 2312.11420).

The backbone stays as it is: the task trains a copy v of a vector. Of a linear operator's bias b: y += v - b. A norm's
output y = g o x' + b, whose gain g is the weight or one more, gets the factor v's gain / g, and its own b; where that
would lose digits the norm runs again, with the task's vectors, on the task's span. Legend: L tokens of one span.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LNTuningConfig
from torch.func import functional_call

from engine.method import SiteKind
from engine.methods import Selective
from engine.peft.adapter import Adapter, Affine, BaseOp, Tensors
from engine.peft.layout import TaskSpan


class VectorCopy:
    """A task's own `weight` or `bias` of one frozen module."""

    def __init__(self, op: BaseOp, tensors: Tensors) -> None:
        self.op = op
        self.vectors = {name: tensors[name] for name in ("weight", "bias") if name in tensors}
        if op.site.kind is SiteKind.NORM:
            shared = {id(t): t for t in (*op.module.parameters(), *op.module.buffers())}
            self.replica = copy.deepcopy(op.module, shared)  # a module of the same tensors, without our hook
            self.replica._forward_hooks.clear()

    def initialise(self) -> None:
        for name, vector in self.vectors.items():
            vector.copy_(getattr(self.op.module, name))

    def apply(self, x_LK: torch.Tensor, y_LN: torch.Tensor) -> torch.Tensor:
        """A norm's output, run again."""
        result: torch.Tensor = functional_call(self.replica, self.vectors, (x_LK,))
        return result.to(y_LN.dtype)

    @property
    def is_affine(self) -> bool:
        return self.op.site.kind is not SiteKind.NORM or self.op.gain_N is not None

    def affine(self) -> Affine | None:
        """What makes the module's output the task's own, if a factor and an offset do."""
        if not self.is_affine:
            return None
        gain_N, shift_N, bias_N = None, None, self.op.bias_N
        if "weight" in self.vectors:
            assert self.op.gain_N is not None
            gain_N = 1 + (self.vectors["weight"] - self.op.weight_KN) / self.op.gain_N
            shift_N = None if bias_N is None else bias_N - gain_N * bias_N
        if "bias" in self.vectors:
            assert bias_N is not None
            shift_N = self.vectors["bias"] - (bias_N if gain_N is None else gain_N * bias_N)
        return Affine(gain_N, shift_N)


class SelectiveAdapter(Adapter):
    """One module's vectors as one task trains them."""

    def __init__(self, method: Selective, op: BaseOp, seed: int, tensors: Tensors) -> None:
        super().__init__(method, op, seed, tensors)
        self.copy = VectorCopy(op, self.tensors)

    def initialise(self) -> None:
        self.copy.initialise()

    def changes_output(self, training: bool) -> bool:
        return not self.copy.is_affine

    def after(self, x_LK: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        return self.copy.apply(x_LK, y_LN)

    @classmethod
    def output_affines(cls, adapters: Sequence["SelectiveAdapter"], training: bool) -> list[Affine | None]:
        return [adapter.copy.affine() for adapter in adapters]

    @classmethod
    def config(
        cls, method: Selective, ops: Sequence[BaseOp], common: Mapping[str, Any]
    ) -> LNTuningConfig | dict[str, Any]:
        """PEFT's LN tuning where every module is a norm, whole; else muxtune's own format."""
        if cls._is_ln_tuning(method, ops):
            fields = {name: value for name, value in common.items() if name != "fan_in_fan_out"}
            return LNTuningConfig(**fields)
        return {"peft_type": method.peft_type, "parameters": list(method.parameters)}

    def exported(self, in_peft: bool) -> dict[str, torch.Tensor]:
        prefix = "ln_tuning_layers." if in_peft else ""
        return {prefix + name: tensor for name, tensor in self.tensors.items()}

    @staticmethod
    def _is_ln_tuning(method: Selective, ops: Sequence[BaseOp]) -> bool:
        sites = [op.site for op in ops]
        taken = method.shapes(sites)
        return all(s.kind is SiteKind.NORM and len(taken[s.name]) == 1 + s.has_bias for s in sites)


ADAPTER = SelectiveAdapter
