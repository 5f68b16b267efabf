"""State of one task on an executor, from its arrival to its end."""

import time
from dataclasses import dataclass, field
from typing import Any

from engine.errors import MuxtuneError
from engine.runtime.checkpoint import CheckpointState
from engine.runtime.out_of_memory import OutOfMemoryError
from engine.task import TaskSpec
from muxtune.v1 import event_pb2, plan_pb2
from services.backoff import Backoff
from services.execution.trainer.background_io import BackgroundCall
from services.execution.trainer.checkpoint_store import CheckpointStore
from services.execution.trainer.early_stop import EarlyStop
from services.telemetry import task_span

Files = dict[str, bytes]


@dataclass(frozen=True)
class RestoreState:
    """The state that a task is restored from: a checkpoint, or the files of its initial adapter."""

    state: CheckpointState | None = None
    used: event_pb2.CheckpointCommitted | None = None
    initial_adapter: Files | None = None


@dataclass
class Completion:
    """The end of a task: `finished` with its adapter, or released for `reason`. Once exported, it is off the device."""

    finished: plan_pb2.TaskFinished | None = None
    reason: str = ""
    is_exported: bool = False
    state: CheckpointState | None = None  # not committed yet
    adapter: Files | None = None


@dataclass
class ResidentTask:
    """A task in one attempt.

    It trains while it is attached to the engine; before and after, it waits for the store or for memory, and delays no
    other task.
    """

    planned: plan_pb2.PlannedTask
    spec: TaskSpec
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    checkpoint_step: int = 0
    checkpoint_time: float = field(default_factory=time.monotonic)
    restore_state: RestoreState | None = None  # fetched, but not attached yet
    completion: Completion | None = None
    background_call: BackgroundCall[Any] | None = None
    waiting_since: float | None = None
    retry_time: float = 0.0
    _backoff: Backoff = field(default_factory=lambda: Backoff(first_seconds=1.0, max_seconds=8.0))

    @property
    def name(self) -> str:
        return self.planned.task

    @property
    def attempt(self) -> int:
        return self.planned.attempt

    @property
    def is_free(self) -> bool:
        """Returns whether no background call is running and the time of the next retry has come."""
        return self.background_call is None and time.monotonic() >= self.retry_time

    @property
    def needs_restore(self) -> bool:
        """Returns whether the task starts from a checkpoint or an initial adapter, which has to be fetched."""
        return self.planned.HasField("resume_from") or bool(self.planned.initial_adapter_key)

    def checkpoint_is_due(self, step: int, every_steps: int, every_seconds: float) -> bool:
        """Returns whether so many steps, or so many seconds, have passed since the last checkpoint."""
        is_old = time.monotonic() - self.checkpoint_time >= every_seconds
        return step > self.checkpoint_step and (is_old or step - self.checkpoint_step >= every_steps)

    def is_at_end(self, step: int) -> bool:
        """Returns whether the task ends at this step, after an evaluation that is due."""
        return step >= self.planned.num_steps or self.early_stop.should_stop(self.spec.training)

    def has_waited(self, seconds: float) -> bool:
        return self.waiting_since is not None and time.monotonic() - self.waiting_since > seconds

    def schedule_retry(self) -> None:
        """Schedules the next retry, each time after a longer wait."""
        now = time.monotonic()
        self.waiting_since = now if self.waiting_since is None else self.waiting_since
        self.retry_time = now + self._backoff.next_seconds()

    def reset_retry(self) -> None:
        """Starts the waits over after a success."""
        self.waiting_since = None
        self._backoff.reset()


def reason_of(error: MuxtuneError | OutOfMemoryError) -> str:
    return f"no memory: {error}" if isinstance(error, OutOfMemoryError) else error.message


def fetch(checkpoints: CheckpointStore, task: plan_pb2.PlannedTask) -> RestoreState:
    """Fetches what the task is restored from. Runs on a background thread."""
    with task_span("fetch", task.task, task.trace_parent):
        if task.HasField("resume_from"):
            return RestoreState(*checkpoints.get_checkpoint(task.task, task.resume_from))
        return RestoreState(initial_adapter=checkpoints.get_adapter(task.initial_adapter_key))
