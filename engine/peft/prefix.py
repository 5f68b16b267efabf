"""Prefix tuning (arXiv 2101.00190): each attention of the task's sequences also sees P trained keys and values.

As in PEFT without reparameterisation, the keys are not rotated, and the sequence's positions start at P.
Legend: P prefix tokens, G key-value heads, D head width, A attentions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PrefixTuningConfig

from engine.methods import Prefix
from engine.peft.adapter import Adapter, BaseOp, Tensors
from engine.peft.seeded_init import normal_


class PrefixAdapter(Adapter):
    """The keys and values [P, 2, G, D] of one task in one layer."""

    method: Prefix

    def initialise(self) -> None:
        """Fill keys and values from a normal distribution, as PEFT's embedding of them."""
        normal_(self.tensors["prefix"], self.seed, f"{self.op.name}/prefix")

    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        key_PGD, value_PGD = self.tensors["prefix"].unbind(1)
        return key_PGD.transpose(0, 1).unsqueeze(0), value_PGD.transpose(0, 1).unsqueeze(0)

    @classmethod
    def config(cls, method: Prefix, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> PrefixTuningConfig:
        num_heads, width = ops[0].in_features, ops[0].out_features
        return PrefixTuningConfig(
            num_virtual_tokens=method.length,
            num_layers=len(ops),
            num_attention_heads=num_heads,
            token_dim=num_heads * width,
            num_transformer_submodules=1,
            **{name: value for name, value in common.items() if name not in ("target_modules", "fan_in_fan_out")},
        )

    def export_tensors(self, in_peft: bool) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def export_shared_tensors(cls, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
        """Return the keys and values of all layers as PEFT stores them, [P, A * 2 * G * D]."""
        stacked_PA = torch.stack([adapter.tensors["prefix"] for adapter in adapters], dim=1)
        return {"prompt_embeddings": stacked_PA.flatten(1)}

    @classmethod
    def load_shared_tensors(cls, adapters: Sequence[Adapter], tensors: Tensors) -> None:
        prefixes = [adapter.tensors["prefix"] for adapter in adapters]
        stacked_PA = tensors["prompt_embeddings"].view(len(prefixes[0]), len(prefixes), *prefixes[0].shape[1:])
        for i, prefix in enumerate(prefixes):
            prefix.copy_(stacked_PA[:, i])


ADAPTER = PrefixAdapter
