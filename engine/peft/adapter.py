"""The common interface of PEFT methods: BaseOp, Adapter, Dispatch, Aggregate (after MuxTune).

A mounted module dispatches each task's tokens to that task's Adapter and aggregates the results into its output. A
method is one file with one Adapter class, which overrides the hooks it needs: `input_affine` changes what the operator
reads, `low_rank` is added by the fused kernel, `change_output` and then `output_affines` change the output.
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
    """A frozen module of the backbone. A linear operator is y = x W + b; other kinds have only their `module`."""

    site: Site
    index: int  # among the mounted modules of its kind: part of the dropout key
    module: nn.Module
    weight_KN: torch.Tensor
    bias_N: torch.Tensor | None = None
    is_conv1d: bool = False  # GPT-2's transposed linear
    gain_N: torch.Tensor | None = None  # factor of a norm's output, where the output may be divided by it

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
    """A change from x to gain o x + shift: float32 vectors, or None for no factor and for no addition."""

    gain_N: torch.Tensor | None
    shift_N: torch.Tensor | None


class Adapter(ABC):
    """One task's parameters at one module. `tensors` are views of the task's flat parameter buffer.

    Hooks receive one span's tokens and must not write to them.
    """

    def __init__(self, method: Any, op: BaseOp, seed: int, tensors: Tensors) -> None:
        self.method, self.op, self.seed = method, op, seed
        self.tensors = dict(tensors)

    @classmethod
    def build(cls, method: Any, ops: Sequence[BaseOp], seed: int, tensors: Mapping[str, Tensors]) -> dict[str, Self]:
        """Return a task's initialised adapters by module name."""
        adapters = {op.name: cls(method, op, seed, tensors[op.name]) for op in ops}
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.initialise()
        return adapters

    @abstractmethod
    def initialise(self) -> None:
        """Fill `tensors` with values that depend on the task's seed and the module alone."""

    def input_affine(self) -> Affine | None:
        """Return the change of x before the operator reads it, or None."""
        return None

    def low_rank(self, span: TaskSpan, training: bool) -> tuple[AdapterSlice, LowRank] | None:
        """Return the factors that the fused kernel adds and the tokens that it adds them to, or None."""
        return None

    def change_output(self, x_LK: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        """Return the output that replaces y; called only where the adapter `changes_output`."""
        return y_LN

    def changes_output(self, training: bool) -> bool:
        return type(self).change_output is not Adapter.change_output

    @classmethod
    def change_outputs(
        cls, uses: Sequence[tuple[TaskSpan, Any]], x_TK: torch.Tensor, ys: Sequence[torch.Tensor], training: bool
    ) -> Sequence[torch.Tensor]:
        """Apply `change_output` to all tasks of this method at one module; overridden to compute them in one launch.

        `ys` are parts of the stream: save a copy for backward, because a view keeps the whole stream alive.
        """
        return [
            adapter.change_output(x_TK[span.start : span.end], y_LN.clone(), span, training)
            for (span, adapter), y_LN in zip(uses, ys, strict=True)
        ]

    @classmethod
    def output_affines(cls, adapters: Sequence[Any], training: bool) -> Sequence[Affine | None]:
        """Return the last change of the output, or None, for each task of this method at one module."""
        return [None] * len(adapters)

    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, [1, G, P, D] each, that an attention's segments also see.

        G heads, P tokens, D width.
        """
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def config(cls, method: Any, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> PeftConfig | dict[str, Any]:
        """Return the adapter_config.json of a task on `ops`: PEFT's, or a dict in muxtune's format (docs/ADAPTERS.md).

        `common`: `target_modules`, `fan_in_fan_out`, `inference_mode`, `base_model_name_or_path`, `task_type`.
        """

    @property
    def frozen_tensors(self) -> Sequence[torch.Tensor]:
        """Tensors that it computes with beside its parameters; adapters that share one return the same object."""
        return ()

    @property
    def started_from(self) -> Tensors:
        """Frozen tensors that another machine could not compute again bit for bit: checkpoints hold them."""
        return {}

    def export_tensors(self, in_peft: bool) -> dict[str, torch.Tensor]:
        """Return tensors by name in the file, without the module's own name; `in_peft`: the format is PEFT's."""
        return dict(self.tensors)

    @property
    def is_target(self) -> bool:
        """Return whether the config's `target_modules` contain its module."""
        return True

    @classmethod
    def export_shared_tensors(cls, adapters: Sequence["Adapter"]) -> dict[str, torch.Tensor]:
        """Return the tensors that belong to several modules together, by their whole name in the file."""
        return {}

    @classmethod
    def load_shared_tensors(cls, adapters: Sequence["Adapter"], tensors: Tensors) -> None:
        """Fill the adapters from a file's `tensors` where `export_shared_tensors` does not return views of them."""
        return


def adapter_slice(op: BaseOp, seed: int, span: TaskSpan, training: bool, scale: float, dropout: float) -> AdapterSlice:
    """Return a span's tokens, scale and dropout mask; the mask's key is (task seed, step, module, position)."""
    if not training or dropout == 0:
        return AdapterSlice(span.start, span.end, scale)
    device_arguments = op.weight_KN.device, span.device_step, span.device_positions_T
    mask = DropoutMask(seed, span.step, op.index, span.positions_L, op.in_features, dropout, *device_arguments)
    return AdapterSlice(span.start, span.end, scale, mask, keep_scale(dropout))
