"""The unified representation of PEFT methods: BaseOp, Adapter, Dispatch, Aggregate (after MuxTune).

A mounted module dispatches each task's tokens to that task's Adapter and aggregates what it computes into the output. A
method is one file with one Adapter class, which overrides the hooks it needs: `input_affine` (what the operator reads),
`low_rank` (what the fused kernel adds), `after` and then `output_affines` (what becomes of the output).
Legend: L tokens of one span, K inputs, N outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from peft import PeftConfig
from torch import nn

from engine.kernels.dropout import DropoutMask, keep_scale
from engine.kernels.multi_lora.types import AdapterSlice, LowRank
from engine.methods.base import Site
from engine.peft.layout import TaskSpan

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class BaseOp:
    """A frozen module of the backbone. A linear operator is y = x W + b; others have their `module` alone."""

    site: Site
    index: int  # among the mounted modules of its kind: part of the dropout key
    module: nn.Module
    weight_KN: torch.Tensor
    bias_N: torch.Tensor | None = None
    is_conv1d: bool = False  # GPT-2's transposed linear
    gain_N: torch.Tensor | None = None  # of a norm, all it multiplies by, where its output may be divided by that

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def in_features(self) -> int:
        return self.site.in_features

    @property
    def out_features(self) -> int:
        return self.site.out_features


class Affine(NamedTuple):
    """x becomes gain o x + shift: float32 vectors, or None where there is nothing to multiply by or to add."""

    gain_N: torch.Tensor | None
    shift_N: torch.Tensor | None


class Adapter(ABC):
    """One task's parameters at one module. `tensors` are views of the task's flat parameter buffer.

    Hooks get one span's tokens and must not write to what they get.
    """

    def __init__(self, method: Any, op: BaseOp, seed: int, tensors: Tensors) -> None:
        self.method, self.op, self.seed = method, op, seed
        self.tensors = dict(tensors)

    @classmethod
    def build(cls, method: Any, ops: Sequence[BaseOp], seed: int, tensors: Mapping[str, Tensors]) -> dict[str, Self]:
        """The adapters of a task by module, initialised."""
        adapters = {op.name: cls(method, op, seed, tensors[op.name]) for op in ops}
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.initialise()
        return adapters

    @abstractmethod
    def initialise(self) -> None:
        """Fills `tensors`, keyed by (task seed, module) alone."""

    def input_affine(self) -> Affine | None:
        """What becomes of x before the operator reads it, or nothing."""
        return None

    def low_rank(self, span: TaskSpan, training: bool) -> tuple[AdapterSlice, LowRank] | None:
        """Where and how, and what, the fused kernel adds; or nothing."""
        return None

    def after(self, x_LK: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        """What the operator answers instead of y; asked only where it `changes_output`."""
        return y_LN

    def changes_output(self, training: bool) -> bool:
        return type(self).after is not Adapter.after

    @classmethod
    def after_all(
        cls, uses: Sequence[tuple[TaskSpan, Any]], x_TK: torch.Tensor, ys: Sequence[torch.Tensor], training: bool
    ) -> Sequence[torch.Tensor]:
        """`after` of all tasks of this method at one module: overridden where their products go in one launch.

        `ys` are parts of the stream: what is kept of one for backward must be a copy, or it holds the whole stream.
        """
        return [
            adapter.after(x_TK[span.start : span.end], y_LN.clone(), span, training)
            for (span, adapter), y_LN in zip(uses, ys, strict=True)
        ]

    @classmethod
    def output_affines(cls, adapters: Sequence[Any], training: bool) -> Sequence[Affine | None]:
        """What becomes of the output last, by all tasks of this method at one module, or nothing."""
        return [None] * len(adapters)

    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [1, G, P, D] each, that an attention's segments also see. G heads, P tokens, D width."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def config(cls, method: Any, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> PeftConfig | dict[str, Any]:
        """The adapter_config.json of a task on `ops`: PEFT's own, or a dict in muxtune's format (see docs/ADAPTERS.md).

        `common`: `target_modules`, `fan_in_fan_out`, `inference_mode`, `base_model_name_or_path`, `task_type`.
        """

    @property
    def frozen(self) -> Sequence[torch.Tensor]:
        """What it holds and computes with beside its parameters; the same tensor for all adapters that share it."""
        return ()

    @property
    def started_from(self) -> Tensors:
        """Of that, what could not be made anew elsewhere bit for bit: it goes into checkpoints."""
        return {}

    def exported(self, in_peft: bool) -> dict[str, torch.Tensor]:
        """Tensors by name in the file, the module's own name left out; `in_peft`: the format is PEFT's."""
        return dict(self.tensors)

    @property
    def is_target(self) -> bool:
        """Whether its module stands among the config's `target_modules`."""
        return True

    @classmethod
    def shared(cls, adapters: Sequence["Adapter"]) -> dict[str, torch.Tensor]:
        """Frozen tensors that the file holds beside those of single modules, by their whole name."""
        return {}

    @classmethod
    def adopt(cls, adapters: Sequence["Adapter"], found: Tensors) -> None:
        """Takes from a file's tensors what `shared` made of several modules'."""
        return


def lora_use(op: BaseOp, seed: int, span: TaskSpan, training: bool, scale: float, dropout: float) -> AdapterSlice:
    """Where on the stream, at which scale, under which mask: keyed by (task seed, step, module, position)."""
    if not training or dropout == 0:
        return AdapterSlice(span.start, span.end, scale)
    there = op.weight_KN.device, span.device_step, span.device_positions_T
    mask = DropoutMask(seed, span.step, op.index, span.positions_L, op.in_features, dropout, *there)
    return AdapterSlice(span.start, span.end, scale, mask, keep_scale(dropout))
