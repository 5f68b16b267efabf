"""One task in an executor's hands: where it stands between its arrival and its end."""

import time
from dataclasses import dataclass, field
from typing import Any

from engine.errors import MuxtuneError
from engine.runtime.checkpoint import CheckpointState
from engine.runtime.out_of_memory import OutOfMemoryError
from engine.task import TaskSpec
from muxtune.v1 import plan_pb2, task_pb2
from services.backoff import Backoff
from services.execution.trainer.background_io import BackgroundCall
from services.execution.trainer.early_stop import EarlyStop

Files = dict[str, bytes]


@dataclass(frozen=True)
class RestoreState:
    """What a task brings along: the checkpoint that it goes on from, or the files of its initial adapter."""

    state: CheckpointState | None = None
    used: task_pb2.CheckpointCommitted | None = None
    initial_adapter: Files | None = None


@dataclass
class Completion:
    """How it leaves: `finished`, with its adapter, or handed back for `reason`. Packed, it is off the device."""

    finished: plan_pb2.TaskFinished | None = None
    reason: str = ""
    is_packed: bool = False
    state: CheckpointState | None = None  # not committed yet
    adapter: Files | None = None


@dataclass
class ResidentTask:
    """A task in one attempt. It trains while it is attached to the engine; before and after, it waits for the store or
    for room, and is in nobody's way."""

    planned: plan_pb2.PlannedTask
    spec: TaskSpec
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    checkpoint_step: int = 0
    checkpoint_time: float = field(default_factory=time.monotonic)
    luggage: RestoreState | None = None  # fetched, but not attached yet
    ending: Completion | None = None
    errand: BackgroundCall[Any] | None = None
    waits_since: float | None = None
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
        """Nothing is under way for it, and it has waited long enough since something failed."""
        return self.errand is None and time.monotonic() >= self.retry_time

    @property
    def has_luggage(self) -> bool:
        """Whether it has to fetch something before it can begin."""
        return self.planned.HasField("resume_from") or bool(self.planned.initial_adapter_key)

    def has_waited(self, seconds: float) -> bool:
        return self.waits_since is not None and time.monotonic() - self.waits_since > seconds

    def schedule_retry(self) -> None:
        """Tried again later, and each time later."""
        now = time.monotonic()
        self.waits_since = now if self.waits_since is None else self.waits_since
        self.retry_time = now + self._backoff.next_seconds()

    def went_well(self) -> None:
        self.waits_since = None
        self._backoff.reset()


def why(error: MuxtuneError | OutOfMemoryError) -> str:
    return f"no memory: {error}" if isinstance(error, OutOfMemoryError) else error.message
