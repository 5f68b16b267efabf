"""Prompt tuning (arXiv 2104.08691): P trained embeddings replace those of each sequence's first P tokens.

Alignment puts P virtual tokens there. Legend: L tokens of one span, P virtual tokens, N width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PromptTuningConfig

from engine.methods import Prompt
from engine.peft.adapter import Adapter, BaseOp
from engine.peft.layout import TaskSpan
from engine.peft.seeded_init import generator_of


class PromptAdapter(Adapter):
    """The embeddings [P, N] of one task's virtual tokens, at the backbone's token embedding."""

    method: Prompt

    def initialise(self) -> None:
        """Copy the embeddings of P tokens that the task's seed draws from the vocabulary."""
        drawn_P = torch.randint(
            0, self.op.in_features, (self.method.length,), generator=generator_of(self.seed, "prompt")
        )
        self.tensors["prompt"].copy_(self.op.weight_KN[drawn_P.to(self.op.weight_KN.device)])

    def change_output(self, x_L: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        prompt_PN, length = self.tensors["prompt"].to(y_LN.dtype), self.method.length
        sequences = torch.split(y_LN, list(span.lengths))
        return torch.cat([piece for y in sequences for piece in (prompt_PN, y[length:])])

    @classmethod
    def config(cls, method: Prompt, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> PromptTuningConfig:
        return PromptTuningConfig(
            num_virtual_tokens=method.length,
            token_dim=ops[0].out_features,
            num_transformer_submodules=1,
            **{name: value for name, value in common.items() if name not in ("target_modules", "fan_in_fan_out")},
        )

    def export_tensors(self, in_peft: bool) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def export_shared_tensors(cls, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": adapters[0].tensors["prompt"]}


ADAPTER = PromptAdapter
