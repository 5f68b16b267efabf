"""A tenant's fine-tuning task: its specification, its states and their legal transitions.

Only the standard library, so that every service and test can import it.
"""

import enum
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from engine.errors import IllegalTransitionError
from engine.methods.base import FieldError, Method


class TaskState(enum.Enum):
    """The states of a task. The last three are final."""

    QUEUED = "queued"  # stored; no executor runs it now
    RUNNING = "running"  # an attempt holds it on an executor
    CANCELLING = "cancelling"  # the tenant cancelled it; the executor exports the adapter as trained so far
    SUCCEEDED = "succeeded"  # the adapter was exported, loaded again and checked
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return not LEGAL_TRANSITIONS[self]


LEGAL_TRANSITIONS: Mapping[TaskState, frozenset[TaskState]] = {
    TaskState.QUEUED: frozenset({TaskState.RUNNING, TaskState.CANCELLED, TaskState.CANCELLING, TaskState.FAILED}),
    TaskState.RUNNING: frozenset(
        {TaskState.QUEUED, TaskState.CANCELLING, TaskState.SUCCEEDED, TaskState.FAILED}
    ),  # back to QUEUED when preempted or when its executor is lost
    TaskState.CANCELLING: frozenset({TaskState.CANCELLED, TaskState.SUCCEEDED, TaskState.FAILED}),
    TaskState.SUCCEEDED: frozenset(),
    TaskState.FAILED: frozenset(),
    TaskState.CANCELLED: frozenset(),
}


def check_transition(task: str, current: TaskState, following: TaskState) -> None:
    """Raise IllegalTransitionError unless `following` may come right after `current`."""
    if following not in LEGAL_TRANSITIONS[current]:
        raise IllegalTransitionError(
            f"{task} is {current.name} and cannot become {following.name}", task=task, state=current.name
        )


class Optimizer(enum.Enum):
    ADAMW = "adamw"
    SGD = "sgd"


class LrSchedule(enum.Enum):
    """The learning rate after a linear warm-up from 0, as transformers' get_scheduler: constant, or down to 0."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Overlength(enum.Enum):
    """The treatment of a row of more than `max_sequence_tokens` tokens."""

    TRUNCATE = "truncate"  # keep the first max_sequence_tokens
    DROP = "drop"  # leave the row out, counted and shown in preflight
    REFUSE = "refuse"  # the task is not admitted


class Affects(enum.Flag):
    """The effects of a field of Training. Cache keys and estimates use the fields that affect them."""

    TOKENS = enum.auto()  # the tokens of a dataset's rows
    DATA = enum.auto()  # the order, split and cut of rows, and how many steps there are
    MEMORY = enum.auto()  # bytes on an executor
    COST = enum.auto()  # seconds of a step
    RANDOMNESS = enum.auto()  # initial factors and dropout masks
    OPTIMIZER = enum.auto()  # how parameters are updated, or when training ends early: nothing that is planned


@dataclass(frozen=True)
class Bound:
    """The condition that a field's value must meet, and the remedy that an error states."""

    holds: Callable[[Any], bool]
    remedy: str


MAX_STEPS = 10_000_000
MAX_SLICE_TOKENS = 1 << 20  # with 8 bytes a token, half of the largest message
_POSITIVE = Bound(lambda value: 0 < value < math.inf, "must be positive and finite")
_NOT_NEGATIVE = Bound(lambda value: 0 <= value < math.inf, "must be finite and not negative")
_BELOW_ONE = Bound(lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
_AT_LEAST_TWO = Bound(lambda value: value >= 2, "must be at least 2")
_ANY = Bound(lambda value: True, "")


def _between(low: float, high: float) -> Bound:
    return Bound(lambda value: low <= value <= high, f"must be {low} to {high}")


def _about(affects: Affects, bound: Bound = _ANY) -> Mapping[str, Any]:
    return {"affects": affects, "bound": bound}


@dataclass(frozen=True)
class Training:
    """Hyperparameters. A step is one optimizer step: the mean loss over the target tokens of one global batch.

    Exactly one of `num_epochs` and `num_steps` is set. The last batch of an epoch may be smaller.
    `max_grad_norm` 0 means no clipping; `heldout_fraction` 0 means no held-out split.

    A field is declared here once: its default, its bound and what it affects. The proto has the same names; conversion,
    validation, cache keys and the step digest are derived.
    """

    learning_rate: float = field(metadata=_about(Affects.OPTIMIZER, _POSITIVE))
    num_steps: int | None = field(default=None, metadata=_about(Affects.DATA, _between(1, MAX_STEPS)))
    num_epochs: int | None = field(default=None, metadata=_about(Affects.DATA, _between(1, MAX_STEPS)))
    lr_schedule: LrSchedule = field(default=LrSchedule.LINEAR, metadata=_about(Affects.OPTIMIZER))
    warmup_steps: int = field(default=0, metadata=_about(Affects.OPTIMIZER, _NOT_NEGATIVE))
    # Sequences that enter a microbatch as one piece; never changes the result.
    micro_batch_size: int = field(
        default=4, metadata=_about(Affects.DATA | Affects.MEMORY | Affects.COST, _between(1, 4096))
    )
    # Sequences of one optimizer step.
    global_batch_size: int = field(default=8, metadata=_about(Affects.DATA | Affects.COST, _between(1, 65536)))
    max_sequence_tokens: int = field(
        default=512, metadata=_about(Affects.TOKENS | Affects.DATA | Affects.MEMORY | Affects.COST, _AT_LEAST_TWO)
    )
    overlength: Overlength = field(default=Overlength.TRUNCATE, metadata=_about(Affects.TOKENS | Affects.DATA))
    optimizer: Optimizer = field(default=Optimizer.ADAMW, metadata=_about(Affects.MEMORY | Affects.COST))
    weight_decay: float = field(default=0.0, metadata=_about(Affects.OPTIMIZER, _NOT_NEGATIVE))
    beta1: float = field(default=0.9, metadata=_about(Affects.OPTIMIZER, _BELOW_ONE))
    beta2: float = field(default=0.999, metadata=_about(Affects.OPTIMIZER, _BELOW_ONE))
    epsilon: float = field(default=1e-8, metadata=_about(Affects.OPTIMIZER, _POSITIVE))
    momentum: float = field(default=0.0, metadata=_about(Affects.MEMORY, _BELOW_ONE))  # SGD only
    max_grad_norm: float = field(default=1.0, metadata=_about(Affects.OPTIMIZER, _NOT_NEGATIVE))
    seed: int = field(default=0, metadata=_about(Affects.DATA | Affects.RANDOMNESS))
    shuffle: bool = field(default=True, metadata=_about(Affects.DATA))
    heldout_fraction: float = field(default=0.0, metadata=_about(Affects.DATA, _between(0, 0.9)))
    # 0: only before the first step and after the last.
    evaluate_every_steps: int = field(default=0, metadata=_about(Affects.DATA, _NOT_NEGATIVE))
    # Evaluations without improvement before the task ends; 0: never.
    early_stop_patience: int = field(default=0, metadata=_about(Affects.OPTIMIZER, _NOT_NEGATIVE))
    early_stop_min_delta: float = field(default=0.0, metadata=_about(Affects.OPTIMIZER, _NOT_NEGATIVE))
    # Special tokens that text, prompt and completion spell out are read as such; else they stay text.
    parse_special_tokens: bool = field(default=False, metadata=_about(Affects.TOKENS | Affects.DATA))
    # Every so many steps, run the step again for the task alone and report the difference; 0: never.
    verify_every_steps: int = field(default=0, metadata=_about(Affects.COST, _NOT_NEGATIVE))


_EVERYTHING = ~Affects(0)


@functools.cache
def fields_affecting(affects: Affects) -> tuple[str, ...]:
    """Return the names of Training's fields with any of these effects, in the order of declaration."""
    return tuple(field.name for field in fields(Training) if field.metadata["affects"] & affects)


def values_affecting(training: Training, affects: Affects) -> tuple[Any, ...]:
    """Return the values of these fields: a cache key for results that depend on them."""
    return tuple(getattr(training, name) for name in fields_affecting(affects))


def out_of_bounds(training: Training, affects: Affects = _EVERYTHING) -> Iterator[FieldError]:
    """Yield the fields with any of these effects that have a value that no backbone allows."""
    for name in fields_affecting(affects):
        value, bound = getattr(training, name), Training.__dataclass_fields__[name].metadata["bound"]
        if value is not None and not bound.holds(value):
            yield FieldError(name, value, bound.remedy)


def slice_error(training: Training, num_virtual_tokens: int = 0) -> FieldError | None:
    """Return the error of a slice of more tokens than one microbatch may have: it travels in one message."""
    sequence_tokens = training.max_sequence_tokens + num_virtual_tokens
    num_tokens = training.micro_batch_size * sequence_tokens
    if num_tokens <= MAX_SLICE_TOKENS:
        return None
    remedy = (
        f"sequences of up to {sequence_tokens} tokens are {num_tokens} tokens, at most {MAX_SLICE_TOKENS} enter a "
        "microbatch as one piece: reduce it, which changes no result"
    )
    return FieldError("micro_batch_size", training.micro_batch_size, remedy)


@dataclass(frozen=True)
class TaskSpec:
    """A tenant's specification of a task. `dataset` and `initial_adapter` are resource names.

    `dataset_version` is the SHA-256 of the dataset's bytes, which admission fills in. A tenant's task with the highest
    `priority` runs first, then the one with the earliest deadline (microseconds since 1970; 0: none).
    """

    backbone: str
    method: Method
    dataset: str
    training: Training
    dataset_version: str = ""
    initial_adapter: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    deadline_microseconds: int = 0


@dataclass(frozen=True)
class Cursor:
    """A position in a task's data: `step` optimizer steps are done. Dataset version and seed determine the rest."""

    step: int = 0


# An evaluation runs forward only: a token of it costs about a third of a token that trains.
EVALUATION_COST = 1 / 3

Interval = tuple[int, int]  # the first token of a part of a step's stream, and the one after its last


def evaluation_is_due(training: Training, step: int, num_steps: int) -> bool:
    """Return whether the held-out split is evaluated after `step` steps (before step number `step` runs)."""
    if training.heldout_fraction <= 0:
        return False
    every = training.evaluate_every_steps
    return step in (0, num_steps) or (every > 0 and step % every == 0)


def num_evaluations(training: Training, num_steps: int, step: int = 0) -> int:
    """Count the evaluations that are due after `step` or more of `num_steps` steps."""
    if training.heldout_fraction <= 0 or step > num_steps:
        return 0
    every = training.evaluate_every_steps or max(1, num_steps)
    multiples = num_steps // every - (step - 1) // every
    return multiples + (num_steps % every > 0)
