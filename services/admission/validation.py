"""Whether a task can be admitted: every field, all that is wrong at once. Pure."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.errors import FieldViolation, InvalidInputError
from engine.planning.plan import BackboneView
from engine.task import Optimizer, TaskSpec, Training

_MAX_LABELS, _MAX_LABEL_CHARACTERS = 64, 63
_MAX_STEPS = 10_000_000
_MAX_PRIORITY = 100


class _Rule(NamedTuple):
    """`holds` or `remedy` is told; `value` is what was sent."""

    field: str
    value: object
    holds: bool
    remedy: str


def validate(spec: TaskSpec, backbones: Sequence[BackboneView]) -> BackboneView:
    """The backbone the spec names. Raises InvalidInputError with one violation for each wrong field."""
    backbone = next((b for b in backbones if b.name == spec.backbone), None)
    wrong = [FieldViolation(r.field, f'"{r.value}" {r.remedy}') for r in _rules(spec, backbone) if not r.holds]
    if backbone is None:
        known = ", ".join(sorted(b.name for b in backbones)) or "none is ready yet"
        wrong.append(FieldViolation("spec.backbone", f'"{spec.backbone}" is unknown; known: {known}'))
    else:
        wrong += _target_violations(spec, backbone)
    if wrong or backbone is None:
        raise InvalidInputError("; ".join(f"{v.field}: {v.description}" for v in wrong), wrong)
    return backbone


def _target_violations(spec: TaskSpec, backbone: BackboneView) -> Iterable[FieldViolation]:
    try:
        spec.method.shapes(backbone.sites)
    except InvalidInputError as error:
        return error.violations
    return ()


def _rules(spec: TaskSpec, backbone: BackboneView | None) -> list[_Rule]:
    labels = spec.labels
    texts = [*labels.keys(), *labels.values()]
    return [
        *(_Rule(f"spec.{spec.method.name}.{w.field}", w.value, False, w.remedy) for w in spec.method.wrongs()),
        _Rule("spec.dataset", spec.dataset, bool(spec.dataset), "must name a dataset"),
        _Rule("spec.priority", spec.priority, abs(spec.priority) <= _MAX_PRIORITY, "must be -100 to 100"),
        _Rule("spec.labels", len(labels), len(labels) <= _MAX_LABELS, f"entries; at most {_MAX_LABELS}"),
        _Rule(
            "spec.labels",
            max(map(len, texts), default=0),
            all(len(text) <= _MAX_LABEL_CHARACTERS for text in texts),
            f"characters; at most {_MAX_LABEL_CHARACTERS} in a key or value",
        ),
        *_training_rules(spec.training, backbone, spec.method.num_virtual_tokens + spec.method.num_prefix_tokens),
    ]


def _training_rules(t: Training, backbone: BackboneView | None, num_added: int) -> list[_Rule]:
    """Those that do not hold. `num_added`: positions that the method adds to every sequence."""
    longest = backbone.max_sequence_tokens - num_added if backbone else math.inf
    steps_field = "num_steps" if t.num_steps is not None else "num_epochs"
    steps = t.num_steps if t.num_steps is not None else t.num_epochs
    rules = [
        _Rule("learning_rate", t.learning_rate, 0 < t.learning_rate < math.inf, "must be positive and finite"),
        _Rule(steps_field, steps, 1 <= (steps or 0) <= _MAX_STEPS, f"must be 1 to {_MAX_STEPS}"),
        _Rule("warmup_steps", t.warmup_steps, t.warmup_steps >= 0, "must not be negative"),
        _Rule(
            "warmup_steps",
            t.warmup_steps,
            t.num_steps is None or t.warmup_steps <= t.num_steps,
            f"must be at most num_steps ({t.num_steps})",
        ),
        _Rule("micro_batch_size", t.micro_batch_size, 1 <= t.micro_batch_size <= 4096, "must be 1 to 4096"),
        _Rule("global_batch_size", t.global_batch_size, 1 <= t.global_batch_size <= 65536, "must be 1 to 65536"),
        _Rule("max_sequence_tokens", t.max_sequence_tokens, t.max_sequence_tokens >= 2, "must be at least 2"),
        _Rule(
            "max_sequence_tokens",
            t.max_sequence_tokens,
            t.max_sequence_tokens <= longest,
            f"must be at most the backbone's {longest}"
            + (f", {num_added} for the method left out" if num_added else ""),
        ),
        _Rule("weight_decay", t.weight_decay, 0 <= t.weight_decay < math.inf, "must be finite and not negative"),
        _Rule("beta1", t.beta1, 0 <= t.beta1 < 1, "must be at least 0 and under 1"),
        _Rule("beta2", t.beta2, 0 <= t.beta2 < 1, "must be at least 0 and under 1"),
        _Rule("epsilon", t.epsilon, 0 < t.epsilon < math.inf, "must be positive"),
        _Rule("momentum", t.momentum, 0 <= t.momentum < 1, "must be at least 0 and under 1"),
        _Rule(
            "momentum", t.momentum, t.momentum == 0 or t.optimizer is Optimizer.SGD, "is for SGD only: leave it unset"
        ),
        _Rule("max_grad_norm", t.max_grad_norm, 0 <= t.max_grad_norm < math.inf, "must be finite and not negative"),
        _Rule("heldout_fraction", t.heldout_fraction, 0 <= t.heldout_fraction <= 0.9, "must be 0 to 0.9"),
        _Rule("evaluate_every_steps", t.evaluate_every_steps, t.evaluate_every_steps >= 0, "must not be negative"),
        _Rule("verify_every_steps", t.verify_every_steps, t.verify_every_steps >= 0, "must not be negative"),
        _Rule("early_stop_patience", t.early_stop_patience, t.early_stop_patience >= 0, "must not be negative"),
        _Rule(
            "early_stop_patience",
            t.early_stop_patience,
            t.early_stop_patience == 0 or t.heldout_fraction > 0,
            "needs a held-out split: set heldout_fraction",
        ),
        _Rule(
            "early_stop_min_delta",
            t.early_stop_min_delta,
            0 <= t.early_stop_min_delta < math.inf,
            "must be finite and not negative",
        ),
    ]
    return [rule._replace(field=f"spec.training.{rule.field}") for rule in rules if not rule.holds]
