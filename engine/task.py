"""A tenant's fine-tuning job: what it asks for, the states it passes, and what may follow what.

Only the standard library, so that every service and test can share these words.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import IllegalTransitionError
from engine.methods.base import Method


class TaskState(enum.Enum):
    """The life of a task. The last three are final."""

    QUEUED = "queued"  # acknowledged and stored; no executor runs it now
    RUNNING = "running"  # an attempt holds it on an executor
    CANCELLING = "cancelling"  # the tenant asked to stop; the executor exports what was trained so far
    SUCCEEDED = "succeeded"  # exported, loaded again, checked
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
    """Raises IllegalTransitionError unless `following` may come right after `current`."""
    if following not in LEGAL_TRANSITIONS[current]:
        raise IllegalTransitionError(
            f"{task} is {current.name} and cannot become {following.name}", task=task, state=current.name
        )


class Optimizer(enum.Enum):
    ADAMW = "adamw"
    SGD = "sgd"


class LrSchedule(enum.Enum):
    """As transformers' get_scheduler: linear warm-up from 0, then constant, linear to 0, or half a cosine to 0."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Overlength(enum.Enum):
    """What happens to a row of more than `max_sequence_tokens` tokens."""

    TRUNCATE = "truncate"  # keep the first max_sequence_tokens
    DROP = "drop"  # leave the row out, counted and shown in preflight
    REFUSE = "refuse"  # the task is not admitted


@dataclass(frozen=True)
class Training:
    """Hyperparameters. A step is one optimizer step: the mean loss over the target tokens of one global batch.

    Exactly one of `num_epochs` and `num_steps` is set. The last batch of an epoch may be smaller.
    `max_grad_norm` 0 means no clipping; `heldout_fraction` 0 means no held-out split.
    """

    learning_rate: float
    num_steps: int | None = None
    num_epochs: int | None = None
    lr_schedule: LrSchedule = LrSchedule.LINEAR
    warmup_steps: int = 0
    micro_batch_size: int = 4  # sequences that enter a microbatch as one piece; never changes the result
    global_batch_size: int = 8  # sequences of one optimizer step
    max_sequence_tokens: int = 512
    overlength: Overlength = Overlength.TRUNCATE
    optimizer: Optimizer = Optimizer.ADAMW
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.0  # SGD only
    max_grad_norm: float = 1.0
    seed: int = 0
    shuffle: bool = True
    heldout_fraction: float = 0.0
    evaluate_every_steps: int = 0  # 0: only before the first and after the last step
    early_stop_patience: int = 0  # evaluations without improvement before the task ends; 0: never
    early_stop_min_delta: float = 0.0
    parse_special_tokens: bool = False  # that text, prompt and completion spell out; else they stay text
    verify_every_steps: int = 0  # run such a step again for the task alone, and report the difference; 0: never


@dataclass(frozen=True)
class TaskSpec:
    """What a tenant asks for. `dataset` and `initial_adapter` are resource names; `dataset_version` is the SHA-256
    of the dataset's bytes, resolved at admission.

    Of a tenant's tasks that of the highest `priority` runs first, then that of the earliest deadline (microseconds
    since the epoch; 0: none).
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
    """Where a task's data stands: `step` optimizer steps are done. With dataset version and seed it says all."""

    step: int = 0


def evaluation_is_due(training: Training, step: int, num_steps: int) -> bool:
    """Whether the held-out split is evaluated when `step` steps are done (before step number `step` is run)."""
    if training.heldout_fraction <= 0:
        return False
    every = training.evaluate_every_steps
    return step in (0, num_steps) or (every > 0 and step % every == 0)
