"""Measures on a small forward pass how many bytes per token a backbone saves for backward.

Also finds which operators read the same tensor. The memory model (`engine.planning.cost.memory_model`) adds what the
tasks' methods save. Legend: T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.runtime.backbone import Backbone

_TOKENS = 64


@dataclass(frozen=True)
class BackboneFootprint:
    """Bytes per token that a backbone saves for backward.

    `kept_token_bytes`: when gradients flow through all layers. `input_groups`: operators with the same number (from 1)
    read the same tensor, which is saved once however many of them are adapted. `recomputed_token_bytes`: of one layer
    while it runs again in backward; 0 without activation checkpointing.
    """

    kept_token_bytes: float
    input_groups: dict[str, int]
    recomputed_token_bytes: float = 0.0


def measure(backbone: Backbone) -> BackboneFootprint:
    """Runs one short sequence with no task resident, and once more if layers run again in backward."""
    checkpointing = backbone.activation_checkpointing
    with checkpointing.switched(False):
        whole, groups = _saved(backbone)
    if not checkpointing.is_on:
        return BackboneFootprint(whole, groups)
    return BackboneFootprint(_saved(backbone)[0], groups, whole / checkpointing.num_layers)


def _saved(backbone: Backbone) -> tuple[float, dict[str, int]]:
    """Returns (bytes per token, input group by operator)."""
    stream = _stream(min(_TOKENS, backbone.max_sequence_tokens))
    weights = {t.untyped_storage().data_ptr() for t in (*backbone.model.parameters(), *backbone.model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}
    inputs: dict[str, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # a reference, so that its address is not used again
        return tensor

    with _hooks(backbone, inputs), torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone.hidden(stream, frozenset())
    numbers = dict[int, int]()
    groups = {name: numbers.setdefault(x.data_ptr(), len(numbers) + 1) for name, x in inputs.items()}
    return sum(storage.nbytes() for storage in saved.values()) / stream.num_tokens, groups


def _stream(num_tokens: int) -> Microbatch:
    range_ = Range("", 0, 0, num_tokens, (Segment(num_tokens, 0),), 1, False)
    ids_T, targets_T = np.zeros(num_tokens, np.int32), np.full(num_tokens, IGNORE, np.int32)
    return Microbatch(0, MicrobatchKind.TRAIN, ids_T, targets_T, (range_,), False)


@contextmanager
def _hooks(backbone: Backbone, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """Makes gradients flow from the embedding on, and records what each operator reads."""

    def record(name: str) -> Any:
        return lambda module, args: inputs.__setitem__(name, args[0])

    embedding = backbone.model.get_input_embeddings()
    handles = [embedding.register_forward_hook(lambda module, args, y: y if y.requires_grad else y.requires_grad_())]
    handles += [module.register_forward_pre_hook(record(name)) for name, module in backbone.operators.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
