"""(IA)^3 (arXiv 2205.05638): a learned factor for each output of an operator, or for each input of a feed-forward one.

    y = l * (x W + b)    or    y = (l * x) W + b

Legend: L tokens of one span, K inputs, N outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import IA3Config

from engine.methods import Ia3
from engine.peft.adapter import Adapter, BaseOp
from engine.peft.layout import TaskSpan


class Ia3Adapter(Adapter):
    """The factors of one task at one operator: [1, K] of a feed-forward one, else [N, 1], as PEFT shapes them."""

    method: Ia3

    def initialise(self) -> None:
        self.tensors["ia3_l"].fill_(1.0)

    @property
    def rewrites_input(self) -> bool:
        return self.method.scales_input(self.op.name)

    @property
    def rewrites_output(self) -> bool:
        return not self.rewrites_input

    def before(self, x_LK: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        return x_LK * self.tensors["ia3_l"].flatten()

    def after(self, x_LK: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        return y_LN * self.tensors["ia3_l"].flatten()

    @classmethod
    def config(cls, method: Ia3, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> IA3Config:
        inputs = [op.name for op in ops if method.scales_input(op.name)]
        return IA3Config(feedforward_modules=inputs, **{**common, "target_modules": [op.name for op in ops]})


ADAPTER = Ia3Adapter
