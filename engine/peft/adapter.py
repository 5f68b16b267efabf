"""The unified representation of PEFT methods: BaseOp, Adapter, Dispatch, Aggregate (MuxTune section 3.2).

A mounted BaseOp dispatches each task's tokens to that task's Adapter and aggregates what it computes into the output.
A method is one file with one Adapter class: how it is parameterised at one operator, and how a microbatch's uses of it
join the operator's output. Legend: T tokens, K inputs, N outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.peft.layout import TaskSpan


@dataclass(frozen=True)
class BaseOp:
    """A frozen linear operator: y = x W + b."""

    name: str  # full name in the backbone
    site: int  # its index among the adaptable operators: part of the dropout key
    weight_KN: torch.Tensor
    bias_N: torch.Tensor | None
    is_conv1d: bool  # GPT-2's transposed linear

    @property
    def in_features(self) -> int:
        return int(self.weight_KN.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.weight_KN.shape[1])


class Adapter(ABC):
    """One task's parameters at one operator. `tensors` are views of the task's flat parameter buffer."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    @abstractmethod
    def aggregate(
        cls, op: BaseOp, x_TK: torch.Tensor, uses: Sequence[tuple[TaskSpan, "Adapter"]], training: bool
    ) -> torch.Tensor:
        """The operator's output [T, N] with every use's contribution on its own span."""
