"""What the executor did, as metrics: counted here, where one port serves them, not in the trainer."""

from collections.abc import Iterable

from muxtune.v1 import plan_pb2
from services.telemetry import meter

_ENDS = ("finished", "failed", "released")


class ExecutorMetrics:
    """By backbone, never by tenant or task: those are thousands. Theirs stand in each task's progress."""

    def __init__(self, backbone: str) -> None:
        self._attributes = {"muxtune.backbone": backbone}
        self._effective = meter().create_counter("muxtune.effective_tokens", unit="{token}")
        self._padding = meter().create_counter("muxtune.padding_tokens", unit="{token}")
        self._steps = meter().create_counter("muxtune.steps", unit="{step}")
        self._seconds = meter().create_counter("muxtune.device_seconds", unit="s")
        self._wait = meter().create_gauge("muxtune.data_wait_fraction", unit="1")
        self._ends = meter().create_counter("muxtune.attempts_ended", unit="{attempt}")

    def tell_wait(self, fraction: float) -> None:
        """The part of its time that it waits for microbatches."""
        self._wait.set(fraction, self._attributes)

    def add(self, results: Iterable[plan_pb2.TaskResult]) -> None:
        """Steps as they were run: those run again after a resume count again."""
        for result in results:
            kind = result.WhichOneof("result")
            if kind == "step_done":
                step = result.step_done
                self._steps.add(1, self._attributes)
                self._effective.add(step.effective_tokens, self._attributes)
                self._padding.add(step.padding_tokens, self._attributes)
                self._seconds.add(step.device_seconds, self._attributes)
            elif kind in _ENDS:
                self._ends.add(1, {**self._attributes, "muxtune.end": kind})
