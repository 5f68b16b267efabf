"""Training of the backbone's own vectors: norm weights and biases (BitFit, arXiv 2106.10199; LN tuning, 2312.11420).

The backbone stays as it is: the task trains a copy v of a vector. Of a linear operator's bias b: y += v - b. A norm's
output y = g o x' + b, whose gain g is the weight or one more, gets the factor v's gain / g, and its own b; where that
would lose digits the norm runs again, with the task's vectors, on the task's span. Legend: L tokens of one
span, N width, U tasks.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LNTuningConfig
from torch.func import functional_call

from engine.methods import Selective
from engine.methods.base import SiteKind
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
        """A norm's output, run again, in at least float32: norms of torch want all their tensors of one type."""
        dtype = torch.promote_types(x_LK.dtype, torch.float32)
        shared = {"weight": self.op.weight_KN, "bias": self.op.bias_N}
        vectors = {name: v.to(dtype) for name, v in {**shared, **self.vectors}.items() if v is not None}
        result: torch.Tensor = functional_call(self.replica, vectors, (x_LK.to(dtype),))
        return result.to(y_LN.dtype)

    @property
    def is_affine(self) -> bool:
        return self.op.site.kind is not SiteKind.NORM or self.op.gain_N is not None


def affines(copies: Sequence[VectorCopy]) -> list[Affine | None]:
    """What makes one module's output each task's own, in few operations for all; nothing where it is to run again."""
    if not copies or not copies[0].is_affine:
        return [None] * len(copies)
    op, base_N = copies[0].op, copies[0].op.gain_N  # of a norm alone, which has all weights there are
    weights = [own.vectors.get("weight") for own in copies]
    gains = weights if base_N is None else _each(weights, lambda v_UN: 1 + (v_UN - op.weight_KN) / base_N)
    if op.bias_N is None:
        return [Affine(gain_N, None) for gain_N in gains]
    bias_N = op.bias_N.to(torch.promote_types(op.bias_N.dtype, torch.float32))
    left = _each(gains, lambda gain_UN: gain_UN * bias_N)  # what the factor makes of the shared bias
    own_UN = torch.stack([c.vectors.get("bias", bias_N) for c in copies])
    shifts = (own_UN - torch.stack([bias_N if left_N is None else left_N for left_N in left])).unbind()
    return [Affine(*pair) for pair in zip(gains, shifts, strict=True)]


def _each(
    vectors: Sequence[torch.Tensor | None], of: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor | None]:
    """`of` all that are there, stacked [U, N]; each in its place."""
    there = [vector for vector in vectors if vector is not None]
    made = iter(of(torch.stack(there)).unbind() if there else ())
    return [None if vector is None else next(made) for vector in vectors]


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
        return affines([adapter.copy for adapter in adapters])

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
