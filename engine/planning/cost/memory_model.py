"""Memory model: predicts bytes of weights, adapters, and what a step keeps and allocates at its peak.

Legend: T tokens of a microbatch, L tokens of the longest sequence.
"""

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from engine.planning.types import BackboneView
from engine.task import Optimizer, TaskSpec

CHUNK_LOGITS = 1 << 24  # elements of one chunk of logits: 64 MiB in float32
_AVERAGING_TOKENS = 1 << 10  # tokens over which bytes that a method saves are averaged


def adapter_bytes(spec: TaskSpec, backbone: BackboneView) -> int:
    """Return the bytes of a task's parameters, gradients and moments, in float32, and of its frozen tensors."""
    shapes = spec.method.shapes(backbone.sites)
    count = sum(math.prod(shape) for tensors in shapes.values() for shape in tensors.values())
    moments = 2 if spec.training.optimizer is Optimizer.ADAMW else int(spec.training.momentum > 0)
    return count * 4 * (2 + moments) + 4 * spec.method.num_frozen_elements(backbone.sites)


def activation_bytes(backbone: BackboneView, num_tokens: int, adapters_token_bytes: float = 0.0) -> int:
    """Return the peak bytes of activations in a step of T tokens that all bear loss.

    Adapters save `adapters_token_bytes` of each token. The peak holds what backward needs of T tokens; three hidden
    states (the last, and the loss's gradient by it at target positions and at all); and the larger of two temporaries:
    logits of a chunk, or one layer's gradients. With activation checkpointing, all that a layer saves is such a
    temporary too.
    """
    logit_bytes = 4 if backbone.element_bytes == 4 else 4 + backbone.element_bytes  # of the head's type, and float32
    logits = logit_bytes * min(num_tokens * backbone.vocab_size, max(CHUNK_LOGITS, backbone.vocab_size))
    hidden = 3 * num_tokens * backbone.hidden_size * backbone.element_bytes
    saved, num_layers = backbone.token_bytes, max(1, backbone.num_layers)
    if backbone.recomputed_token_bytes:
        layer = 2 * backbone.recomputed_token_bytes + adapters_token_bytes / num_layers
    else:
        layer, saved = saved / num_layers, saved + adapters_token_bytes
    return int(num_tokens * saved + hidden + max(logits, num_tokens * layer))


def saved_bytes(spec: TaskSpec, backbone: BackboneView, num_tokens: int) -> int:
    """Return the bytes that the task's method saves for backward beside the backbone, for T tokens of the task."""
    adapted = spec.method.shapes(backbone.sites)
    elements = sum(
        spec.method.saved_activation_elements(site, num_tokens) for site in backbone.sites if site.name in adapted
    )
    return elements * backbone.element_bytes


@dataclass(frozen=True)
class TaskFootprint:
    """Memory that a task demands of an executor. `saved_token_bytes`: saved for backward per token of the task.

    `input_mask`: operators' inputs (a mask of `BackboneView.inputs`) that are saved for every token of a microbatch,
    once for all tasks that need them.
    """

    adapter_bytes: int
    saved_token_bytes: float
    input_mask: int
    sequence_tokens: int
    slice_tokens: int


def footprint(spec: TaskSpec, backbone: BackboneView) -> TaskFootprint:
    """Return a task's footprint. Raises InvalidInputError if its method names a module that the backbone lacks."""
    longest = sequence_tokens(spec)
    return TaskFootprint(
        adapter_bytes=adapter_bytes(spec, backbone),
        saved_token_bytes=saved_bytes(spec, backbone, _AVERAGING_TOKENS) / _AVERAGING_TOKENS,
        input_mask=backbone.inputs.mask(spec.method.sites_that_save_inputs(backbone.sites)),
        sequence_tokens=longest,
        slice_tokens=longest * spec.training.micro_batch_size,
    )


def sequence_tokens(spec: TaskSpec) -> int:
    """Return the tokens of the task's longest sequence, virtual and prefix tokens included."""
    return spec.training.max_sequence_tokens + spec.method.num_virtual_tokens + spec.method.num_prefix_tokens


def microbatch_tokens(specs: Iterable[TaskSpec], token_budget: int, chunk_tokens: int) -> int:
    """Return the tokens of the tasks' largest microbatch, as `largest_microbatch_tokens` defines it."""
    pairs = [(sequence_tokens(spec), spec.training.micro_batch_size * sequence_tokens(spec)) for spec in specs]
    sequence, slice_ = (max(column) for column in zip((0, 0), *pairs, strict=True))
    return largest_microbatch_tokens(sequence, slice_, token_budget, chunk_tokens)


def largest_microbatch_tokens(sequence_tokens: int, slice_tokens: int, token_budget: int, chunk_tokens: int) -> int:
    """Return the tokens of the largest microbatch, of the longest sequence and the largest slice.

    It is the budget, up to four budgets for a larger slice, and always enough for one sequence, which is never cut.
    """
    largest = max(token_budget, min(slice_tokens, 4 * token_budget), sequence_tokens)
    return -(-largest // chunk_tokens) * chunk_tokens


def total_bytes(specs: Iterable[TaskSpec], backbone: BackboneView, num_tokens: int) -> int:
    """Return the peak bytes of a process with one backbone, all adapters, and one microbatch in flight.

    The microbatch is the worst one: all its tokens belong to the task whose method saves most.
    """
    footprints = [footprint(spec, backbone) for spec in specs]
    return resident_bytes(
        backbone,
        sum(f.adapter_bytes for f in footprints),
        max((f.saved_token_bytes for f in footprints), default=0.0),
        functools.reduce(operator.or_, (f.input_mask for f in footprints), 0),
        num_tokens,
    )


def resident_bytes(
    backbone: BackboneView, all_adapter_bytes: int, saved_token_bytes: float, input_mask: int, num_tokens: int
) -> int:
    """Return the same as `total_bytes`, from the totals of the tasks' footprints."""
    saved = saved_token_bytes + backbone.inputs.token_bytes(input_mask)
    allocated = all_adapter_bytes + activation_bytes(backbone, num_tokens, saved)
    fixed = backbone.process_bytes + backbone.weight_bytes + backbone.packed_weight_bytes
    return fixed + math.ceil(backbone.allocator_slack * allocated)


def separate_instance_bytes(spec: TaskSpec, backbone: BackboneView) -> int:
    """Return the bytes of a separate process that trains this task alone, with its copy of the backbone.

    Left out are the bytes that any process has, with or without a backbone, and weights that only this engine packs.
    """
    num_tokens = spec.training.micro_batch_size * sequence_tokens(spec)
    return total_bytes([spec], backbone, num_tokens) - backbone.process_bytes - backbone.packed_weight_bytes
