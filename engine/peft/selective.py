"""Training of the backbone's own vectors: norm weights and biases (BitFit, arXiv 2106.10199; LN tuning, 2312.11420).

The backbone does not change: the task trains a copy v of a vector. For a linear operator's bias b: y += v - b. A norm
returns y = g o x' + b, where the gain g is its weight, or 1 + its weight: y is multiplied by (gain of v) / g and gets
the task's own b. Where the division would lose digits, the norm runs again on the task's span with the task's vectors.
Legend: L tokens of one span, N width, U tasks.
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
    """A task's copy of the `weight` or `bias` of one frozen module."""

    def __init__(self, op: BaseOp, tensors: Tensors) -> None:
        self.op = op
        self.vectors = {name: tensors[name] for name in ("weight", "bias") if name in tensors}
        if op.site.kind is SiteKind.NORM:
            shared = {id(t): t for t in (*op.module.parameters(), *op.module.buffers())}
            self.replica = copy.deepcopy(op.module, shared)  # shares the module's tensors, without our hook
            self.replica._forward_hooks.clear()

    def initialise(self) -> None:
        for name, vector in self.vectors.items():
            vector.copy_(getattr(self.op.module, name))

    def apply(self, x_LK: torch.Tensor, y_LN: torch.Tensor) -> torch.Tensor:
        """Run a norm again with the task's vectors, in at least float32: torch's norms need all tensors of one type."""
        dtype = torch.promote_types(x_LK.dtype, torch.float32)
        shared = {"weight": self.op.weight_KN, "bias": self.op.bias_N}
        vectors = {name: v.to(dtype) for name, v in {**shared, **self.vectors}.items() if v is not None}
        result: torch.Tensor = functional_call(self.replica, vectors, (x_LK.to(dtype),))
        return result.to(y_LN.dtype)

    @property
    def is_affine(self) -> bool:
        return self.op.site.kind is not SiteKind.NORM or self.op.gain_N is not None


def affines(copies: Sequence[VectorCopy]) -> list[Affine | None]:
    """Return the change of one module's output for each task, computed together; None where the norm runs again."""
    if not copies or not copies[0].is_affine:
        return [None] * len(copies)
    op, base_N = copies[0].op, copies[0].op.gain_N  # only norms have weights to copy
    weights = [copy_.vectors.get("weight") for copy_ in copies]
    gains = weights if base_N is None else _map_stacked(weights, lambda v_UN: 1 + (v_UN - op.weight_KN) / base_N)
    if op.bias_N is None:
        return [Affine(gain_N, None) for gain_N in gains]
    bias_N = op.bias_N.to(torch.promote_types(op.bias_N.dtype, torch.float32))
    scaled = _map_stacked(gains, lambda gain_UN: gain_UN * bias_N)  # the shared bias after the factor
    bias_UN = torch.stack([copy_.vectors.get("bias", bias_N) for copy_ in copies])
    shifts = (bias_UN - torch.stack([bias_N if scaled_N is None else scaled_N for scaled_N in scaled])).unbind()
    return [Affine(*pair) for pair in zip(gains, shifts, strict=True)]


def _map_stacked(
    vectors: Sequence[torch.Tensor | None], function: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Apply `function` to the vectors stacked [U, N], and return its rows in their order; None stays None."""
    present = [vector for vector in vectors if vector is not None]
    results = iter(function(torch.stack(present)).unbind() if present else ())
    return [None if vector is None else next(results) for vector in vectors]


class SelectiveAdapter(Adapter):
    """The vectors of one module that one task trains."""

    def __init__(self, method: Selective, op: BaseOp, seed: int, tensors: Tensors) -> None:
        super().__init__(method, op, seed, tensors)
        self.copy = VectorCopy(op, self.tensors)

    def initialise(self) -> None:
        self.copy.initialise()

    def changes_output(self, training: bool) -> bool:
        return not self.copy.is_affine

    def change_output(self, x_LK: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        return self.copy.apply(x_LK, y_LN)

    @classmethod
    def output_affines(cls, adapters: Sequence["SelectiveAdapter"], training: bool) -> list[Affine | None]:
        return affines([adapter.copy for adapter in adapters])

    @classmethod
    def config(
        cls, method: Selective, ops: Sequence[BaseOp], common: Mapping[str, Any]
    ) -> LNTuningConfig | dict[str, Any]:
        """Return PEFT's LN tuning where all vectors of norms and no others are trained; else muxtune's own format."""
        if cls._is_ln_tuning(method, ops):
            fields = {name: value for name, value in common.items() if name != "fan_in_fan_out"}
            return LNTuningConfig(**fields)
        return {"peft_type": method.peft_type, "parameters": list(method.parameters)}

    def export_tensors(self, in_peft: bool) -> dict[str, torch.Tensor]:
        prefix = "ln_tuning_layers." if in_peft else ""
        return {prefix + name: tensor for name, tensor in self.tensors.items()}

    @staticmethod
    def _is_ln_tuning(method: Selective, ops: Sequence[BaseOp]) -> bool:
        sites = [op.site for op in ops]
        shapes = method.shapes(sites)
        return all(s.kind is SiteKind.NORM and len(shapes[s.name]) == 1 + s.has_bias for s in sites)


ADAPTER = SelectiveAdapter
