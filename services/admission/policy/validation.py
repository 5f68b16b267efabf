"""Whether a task can be admitted: every field, all that is wrong at once. Pure."""

import math
from collections.abc import Iterator, Sequence

from engine.errors import FieldViolation, InvalidInputError
from engine.planning.types import BackboneView
from engine.task import Optimizer, TaskSpec, Training, out_of_bounds

_MAX_LABELS, _MAX_LABEL_CHARACTERS = 64, 63
_MAX_PRIORITY = 100


def validate(spec: TaskSpec, backbones: Sequence[BackboneView], *, is_known: bool = False) -> BackboneView:
    """The backbone the spec names. `is_known`: its method was found right on that backbone before.

    Raises InvalidInputError with one violation for each wrong field.
    """
    backbone = next((b for b in backbones if b.name == spec.backbone), None)
    wrong = [_violation(*told) for told in (*(() if is_known else _wrongs_of_method(spec)), *_wrongs(spec))]
    num_added = spec.method.num_virtual_tokens + spec.method.num_prefix_tokens
    longest = backbone.max_sequence_tokens - num_added if backbone else math.inf
    for field, remedy in _wrongs_of_training(spec.training, longest, num_added):
        wrong.append(_violation(f"training.{field}", getattr(spec.training, field), remedy))
    if backbone is None:
        known = ", ".join(sorted(b.name for b in backbones)) or "none is ready yet"
        wrong.append(FieldViolation("spec.backbone", f'"{spec.backbone}" is unknown; known: {known}'))
    elif not is_known:
        wrong += _wrong_targets(spec, backbone)
    if wrong or backbone is None:
        raise InvalidInputError.of_fields(wrong)
    return backbone


def _violation(field: str, value: object, remedy: str) -> FieldViolation:
    return FieldViolation(f"spec.{field}", f'"{value}" {remedy}')


def _wrong_targets(spec: TaskSpec, backbone: BackboneView) -> Sequence[FieldViolation]:
    try:
        spec.method.shapes(backbone.sites)
    except InvalidInputError as error:
        return error.violations
    return ()


def _wrongs_of_method(spec: TaskSpec) -> Iterator[tuple[str, object, str]]:
    """(field, what was sent, what would do)."""
    for wrong in spec.method.validate():
        yield f"{spec.method.name}.{wrong.field}", wrong.value, wrong.remedy


def _wrongs(spec: TaskSpec) -> Iterator[tuple[str, object, str]]:
    """The same of the rest, without its training."""
    if not spec.dataset:
        yield "dataset", spec.dataset, "must name a dataset"
    if abs(spec.priority) > _MAX_PRIORITY:
        yield "priority", spec.priority, f"must be -{_MAX_PRIORITY} to {_MAX_PRIORITY}"
    if len(spec.labels) > _MAX_LABELS:
        yield "labels", len(spec.labels), f"entries; at most {_MAX_LABELS}"
    longest = max((len(text) for label in spec.labels.items() for text in label), default=0)
    if longest > _MAX_LABEL_CHARACTERS:
        yield "labels", longest, f"characters; at most {_MAX_LABEL_CHARACTERS} in a key or value"


def _wrongs_of_training(t: Training, longest: float, num_added: int) -> Iterator[tuple[str, str]]:
    """(field, what would do). `longest`: tokens that the backbone takes, without the `num_added` positions that the
    method adds to every sequence."""
    for wrong in out_of_bounds(t):
        yield wrong.field, wrong.remedy
    if t.num_steps is not None and t.warmup_steps > t.num_steps:
        yield "warmup_steps", f"must be at most num_steps ({t.num_steps})"
    if t.max_sequence_tokens > longest:
        left_out = f", {num_added} for the method left out" if num_added else ""
        yield "max_sequence_tokens", f"must be at most the backbone's {longest}{left_out}"
    if t.momentum != 0 and t.optimizer is not Optimizer.SGD:
        yield "momentum", "is for SGD only: leave it unset"
    if t.early_stop_patience > 0 and not t.heldout_fraction > 0:
        yield "early_stop_patience", "needs a held-out split: set heldout_fraction"
