"""(IA)^3 (arXiv 2205.05638): learned factors of an operator's outputs, or of a feed-forward operator's inputs.

    y = l * (x W + b)    or    y = (l * x) W + b

Legend: K inputs, N outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import IA3Config

from engine.methods import Ia3
from engine.peft.adapter import Adapter, Affine, BaseOp


class Ia3Adapter(Adapter):
    """The factors of one task at one operator: [1, K] at a feed-forward operator, else [N, 1], as in PEFT."""

    method: Ia3

    def initialise(self) -> None:
        self.tensors["ia3_l"].fill_(1.0)

    @property
    def _affine(self) -> Affine:
        return Affine(self.tensors["ia3_l"].flatten(), None)

    def input_affine(self) -> Affine | None:
        return self._affine if self.method.scales_input(self.op.name) else None

    @classmethod
    def output_affines(cls, adapters: Sequence["Ia3Adapter"], training: bool) -> list[Affine | None]:
        return [None if adapter.method.scales_input(adapter.op.name) else adapter._affine for adapter in adapters]

    @classmethod
    def config(cls, method: Ia3, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> IA3Config:
        inputs = [op.name for op in ops if method.scales_input(op.name)]
        return IA3Config(feedforward_modules=inputs, **{**common, "target_modules": [op.name for op in ops]})


ADAPTER = Ia3Adapter
