"""Bytes, before the device says no: weights, adapters, and what a step keeps and makes at its peak.

Legend: T tokens of a microbatch, L tokens of the longest sequence.
"""

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from engine.planning.types import BackboneView
from engine.task import Optimizer, TaskSpec

_CHUNK_LOGITS = 1 << 24  # elements: engine.kernels.segment_cross_entropy
_MANY = 1 << 10  # tokens, over which what a method keeps is averaged


def adapter_bytes(spec: TaskSpec, backbone: BackboneView) -> int:
    """Parameters, gradients and optimizer moments of one task, float32, and what its method keeps frozen beside."""
    shapes = spec.method.shapes(backbone.sites)
    count = sum(math.prod(shape) for tensors in shapes.values() for shape in tensors.values())
    moments = 2 if spec.training.optimizer is Optimizer.ADAMW else int(spec.training.momentum > 0)
    return count * 4 * (2 + moments) + 4 * spec.method.num_frozen_elements(backbone.sites)


def activation_bytes(backbone: BackboneView, num_tokens: int, adapters_token_bytes: float = 0.0) -> int:
    """What there is at the peak of a step of T tokens, all of which bear loss; adapters keep so much of each token.

    Kept for backward by T tokens; three hidden states (the last, the loss's gradient by it at target positions and at
    all); and the larger of what comes and goes: logits of a chunk, or one layer's gradients. Where layers
    run again in backward, all that a layer keeps comes and goes with its gradients.
    """
    logit = 4 if backbone.element_bytes == 4 else 4 + backbone.element_bytes  # as the head gives it, and in float32
    logits = logit * min(num_tokens * backbone.vocab_size, max(_CHUNK_LOGITS, backbone.vocab_size))
    hidden = 3 * num_tokens * backbone.hidden_size * backbone.element_bytes
    kept, num_layers = backbone.token_bytes, max(1, backbone.num_layers)
    if backbone.recomputed_token_bytes:
        layer = 2 * backbone.recomputed_token_bytes + adapters_token_bytes / num_layers
    else:
        layer, kept = kept / num_layers, kept + adapters_token_bytes
    return int(num_tokens * kept + hidden + max(logits, num_tokens * layer))


def kept_bytes(spec: TaskSpec, backbone: BackboneView, num_tokens: int) -> int:
    """What the method keeps for backward beside that, were all T tokens this task's."""
    taken = spec.method.shapes(backbone.sites)
    kept = sum(spec.method.saved_activation_elements(site, num_tokens) for site in backbone.sites if site.name in taken)
    return kept * backbone.element_bytes


@dataclass(frozen=True)
class Footprint:
    """What a task asks of an executor's memory, worked out once: `kept_bytes` by a token of its own, and the operators'
    inputs (a mask of `BackboneView.inputs`) that are kept whole, for every token, once for all tasks that need them."""

    adapter_bytes: int
    kept_bytes: float
    input_mask: int
    sequence_tokens: int
    slice_tokens: int


def footprint(spec: TaskSpec, backbone: BackboneView) -> Footprint:
    """Raises InvalidInputError if its method names what the backbone has not."""
    longest = sequence_tokens(spec)
    return Footprint(
        adapter_bytes=adapter_bytes(spec, backbone),
        kept_bytes=kept_bytes(spec, backbone, _MANY) / _MANY,
        input_mask=backbone.inputs.mask(spec.method.sites_that_save_inputs(backbone.sites)),
        sequence_tokens=longest,
        slice_tokens=longest * spec.training.micro_batch_size,
    )


def sequence_tokens(spec: TaskSpec) -> int:
    """Of its longest sequence in the stream, and the prefix it attends to."""
    return spec.training.max_sequence_tokens + spec.method.num_virtual_tokens + spec.method.num_prefix_tokens


def microbatch_tokens(specs: Iterable[TaskSpec], token_budget: int, chunk_tokens: int) -> int:
    """Tokens of the largest microbatch: the budget, more for a larger slice (to four budgets), and always enough for
    one sequence, which alignment never cuts."""
    pairs = [(sequence_tokens(spec), spec.training.micro_batch_size * sequence_tokens(spec)) for spec in specs]
    sequence, slice_ = (max(column) for column in zip((0, 0), *pairs, strict=True))
    return largest_tokens(sequence, slice_, token_budget, chunk_tokens)


def largest_tokens(sequence_tokens: int, slice_tokens: int, token_budget: int, chunk_tokens: int) -> int:
    """The same, of the longest sequence and the largest slice."""
    largest = max(token_budget, min(slice_tokens, 4 * token_budget), sequence_tokens)
    return -(-largest // chunk_tokens) * chunk_tokens


def total_bytes(specs: Iterable[TaskSpec], backbone: BackboneView, num_tokens: int) -> int:
    """One process with one backbone, all adapters, one microbatch in flight: at worst all of the method that keeps
    most."""
    footprints = [footprint(spec, backbone) for spec in specs]
    return resident_bytes(
        backbone,
        sum(f.adapter_bytes for f in footprints),
        max((f.kept_bytes for f in footprints), default=0.0),
        functools.reduce(operator.or_, (f.input_mask for f in footprints), 0),
        num_tokens,
    )


def resident_bytes(
    backbone: BackboneView, all_adapter_bytes: int, kept_token_bytes: float, input_mask: int, num_tokens: int
) -> int:
    """The same, of what the footprints add up to."""
    kept = kept_token_bytes + backbone.inputs.token_bytes(input_mask)
    moving = all_adapter_bytes + activation_bytes(backbone, num_tokens, kept)
    fixed = backbone.process_bytes + backbone.weight_bytes + backbone.packed_weight_bytes
    return fixed + math.ceil(backbone.allocator_slack * moving)


def separate_instance_bytes(spec: TaskSpec, backbone: BackboneView) -> int:
    """The task in a process of its own: its own backbone and a microbatch of its own size. What any process has, with
    or without a backbone, is left out, and weights that only we pack."""
    num_tokens = spec.training.micro_batch_size * sequence_tokens(spec)
    return total_bytes([spec], backbone, num_tokens) - backbone.process_bytes - backbone.packed_weight_bytes
