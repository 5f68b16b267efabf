"""Bytes, before the device says no. A first, deliberately simple model: every term is a stated formula.

Legend: T tokens of a microbatch, L tokens of the longest sequence.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import WillNeverFitError
from engine.planning.plan import BackboneView, ExecutorView
from engine.task import Optimizer, TaskSpec

_SLACK = 1.1  # allocator and workspaces, on what is not weights
_LOGITS_CHUNK_BYTES = 3 * (64 << 20)  # logits, their exponentials and a copy: engine.kernels.segment_cross_entropy
_GIB = 1 << 30
_MANY = 1 << 10  # tokens, over which what a method keeps is averaged


def adapter_bytes(spec: TaskSpec, backbone: BackboneView) -> int:
    """Parameters, gradients and optimizer moments of one task, float32, and what its method keeps frozen beside."""
    shapes = spec.method.shapes(backbone.sites)
    count = sum(math.prod(shape) for tensors in shapes.values() for shape in tensors.values())
    moments = 2 if spec.training.optimizer is Optimizer.ADAMW else int(spec.training.momentum > 0)
    return count * 4 * (2 + moments) + 4 * spec.method.num_frozen(backbone.sites)


def activation_bytes(backbone: BackboneView, num_tokens: int) -> int:
    """Kept for backward, by layer: the inputs and outputs of its operators and the two norms, for T tokens."""
    per_token = backbone.linear_width + 6 * backbone.num_layers * backbone.hidden_size
    return int(_SLACK * num_tokens * per_token * backbone.element_bytes) + _LOGITS_CHUNK_BYTES


def kept_bytes(spec: TaskSpec, backbone: BackboneView, num_tokens: int) -> int:
    """What the method keeps for backward beside that, were all T tokens this task's."""
    taken = spec.method.shapes(backbone.sites)
    kept = sum(spec.method.kept_elements(site, num_tokens) for site in backbone.sites if site.name in taken)
    return int(_SLACK * kept * backbone.element_bytes)


@dataclass(frozen=True)
class Footprint:
    """What a task asks of an executor's memory, worked out once: `kept_bytes` by a token of its own."""

    adapter_bytes: int
    kept_bytes: float
    sequence_tokens: int
    slice_tokens: int


def footprint(spec: TaskSpec, backbone: BackboneView) -> Footprint:
    """Raises InvalidInputError if its method names what the backbone has not."""
    longest = sequence_tokens(spec)
    return Footprint(
        adapter_bytes=adapter_bytes(spec, backbone),
        kept_bytes=kept_bytes(spec, backbone, _MANY) / _MANY,
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
    """One backbone, all adapters, one microbatch in flight: at worst all of the method that keeps most."""
    footprints = [footprint(spec, backbone) for spec in specs]
    adapters = sum(f.adapter_bytes for f in footprints)
    return resident_bytes(backbone, adapters, max((f.kept_bytes for f in footprints), default=0.0), num_tokens)


def resident_bytes(backbone: BackboneView, all_adapter_bytes: int, kept_token_bytes: float, num_tokens: int) -> int:
    """The same, of what the footprints add up to."""
    kept = math.ceil(kept_token_bytes * num_tokens)
    return backbone.weight_bytes + int(_SLACK * all_adapter_bytes) + activation_bytes(backbone, num_tokens) + kept


def separate_instance_bytes(spec: TaskSpec, backbone: BackboneView) -> int:
    """The task in a process of its own: its own backbone and a microbatch of its own size."""
    num_tokens = spec.training.micro_batch_size * sequence_tokens(spec)
    return total_bytes([spec], backbone, num_tokens)


def refuse_if_never_fits(spec: TaskSpec, executors: Iterable[ExecutorView], token_budget: int, chunk: int) -> None:
    """Raises WillNeverFitError, with the bytes and a remedy, if no executor could hold the task even alone."""
    known = [e for e in executors if e.backbone.name == spec.backbone]
    if not known:
        return
    needed = {e.name: total_bytes([spec], e.backbone, microbatch_tokens([spec], token_budget, chunk)) for e in known}
    if any(needed[e.name] <= e.memory_bytes for e in known):
        return
    largest = max(e.memory_bytes for e in known)
    raise WillNeverFitError.of_field(
        "spec.training.micro_batch_size",
        f"the task needs {min(needed.values()) / _GIB:.1f} GiB, the executors of {spec.backbone} have at most "
        f"{largest / _GIB:.1f} GiB: reduce micro_batch_size, max_sequence_tokens or the rank",
    )
