"""Validates the fields of a task and reports all violations at once. Pure."""

import math
from collections.abc import Iterator, Sequence

from engine.errors import FieldViolation, InvalidInputError
from engine.planning.types import BackboneView
from engine.task import Optimizer, TaskSpec, Training, out_of_bounds, slice_error

_MAX_LABELS, _MAX_LABEL_CHARACTERS = 64, 63
_MAX_PRIORITY = 100


def validate(spec: TaskSpec, backbones: Sequence[BackboneView], *, is_method_valid: bool = False) -> BackboneView:
    """Return the backbone that the spec names. Raises InvalidInputError with one violation for each wrong field.

    `is_method_valid`: the method passed on that backbone before and is not checked again.
    """
    backbone = next((b for b in backbones if b.name == spec.backbone), None)
    errors = [] if is_method_valid else [*_check_method(spec)]
    violations = [_violation(*error) for error in (*errors, *_check_task(spec))]
    num_added = spec.method.num_virtual_tokens + spec.method.num_prefix_tokens
    max_tokens = backbone.max_sequence_tokens - num_added if backbone else math.inf
    for field, remedy in _check_training(spec.training, max_tokens, num_added, spec.method.num_virtual_tokens):
        violations.append(_violation(f"training.{field}", getattr(spec.training, field), remedy))
    if backbone is None:
        names = ", ".join(sorted(b.name for b in backbones)) or "none, until an executor registers"
        violations.append(FieldViolation("spec.backbone", f'"{spec.backbone}" is unknown; known: {names}'))
    elif not is_method_valid:
        violations += _check_targets(spec, backbone)
    if violations or backbone is None:
        raise InvalidInputError.of_fields(violations)
    return backbone


def _violation(field: str, value: object, remedy: str) -> FieldViolation:
    return FieldViolation(f"spec.{field}", f'"{value}" {remedy}')


def _check_targets(spec: TaskSpec, backbone: BackboneView) -> Sequence[FieldViolation]:
    try:
        spec.method.shapes(backbone.sites)
    except InvalidInputError as error:
        return error.violations
    return ()


def _check_method(spec: TaskSpec) -> Iterator[tuple[str, object, str]]:
    """Yield (field, value, remedy) of each error of the method's options."""
    for error in spec.method.validate():
        yield f"{spec.method.name}.{error.field}", error.value, error.remedy


def _check_task(spec: TaskSpec) -> Iterator[tuple[str, object, str]]:
    """Yield (field, value, remedy) of each error outside the method and the training."""
    if not spec.dataset:
        yield "dataset", spec.dataset, "must name a dataset"
    if abs(spec.priority) > _MAX_PRIORITY:
        yield "priority", spec.priority, f"must be -{_MAX_PRIORITY} to {_MAX_PRIORITY}"
    if len(spec.labels) > _MAX_LABELS:
        yield "labels", len(spec.labels), f"entries: at most {_MAX_LABELS}"
    max_characters = max((len(text) for label in spec.labels.items() for text in label), default=0)
    if max_characters > _MAX_LABEL_CHARACTERS:
        yield "labels", max_characters, f"characters: at most {_MAX_LABEL_CHARACTERS} in a key or value"


def _check_training(t: Training, max_tokens: float, num_added: int, num_virtual: int) -> Iterator[tuple[str, str]]:
    """Yield (field, remedy) of each error. `max_tokens`: tokens of a sequence that the backbone accepts, without the
    `num_added` positions that the method adds to every sequence, of which `num_virtual` are tokens of the stream."""
    wrong = list(out_of_bounds(t))
    for error in wrong:
        yield error.field, error.remedy
    if not wrong and (too_long := slice_error(t, num_virtual)):
        yield too_long.field, too_long.remedy
    if t.num_steps is not None and t.warmup_steps > t.num_steps:
        yield "warmup_steps", f"must be at most num_steps ({t.num_steps})"
    if t.max_sequence_tokens > max_tokens:
        reason = f", of which the method uses {num_added}" if num_added else ""
        yield "max_sequence_tokens", f"must be at most {max_tokens}: the backbone has {max_tokens + num_added}{reason}"
    if t.momentum != 0 and t.optimizer is not Optimizer.SGD:
        yield "momentum", "applies to SGD only: leave it unset"
    if t.early_stop_patience > 0 and not t.heldout_fraction > 0:
        yield "early_stop_patience", "needs a held-out split: set heldout_fraction"
