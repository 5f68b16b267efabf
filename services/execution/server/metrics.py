"""Metrics of the executor. The server counts them, not the trainer, because its port serves them."""

from collections.abc import Iterable

from muxtune.v1 import plan_pb2
from services.conversion.results import ATTEMPT_ENDS
from services.telemetry import meter


class ExecutorMetrics:
    """Counts tokens, steps, device seconds and ended attempts by backbone.

    Tenants and tasks are not attributes, because there are thousands; each task's progress has separate counts.
    """

    def __init__(self, backbone: str) -> None:
        self._attributes = {"muxtune.backbone": backbone}
        self._effective = meter().create_counter("muxtune.effective_tokens", unit="{token}")
        self._padding = meter().create_counter("muxtune.padding_tokens", unit="{token}")
        self._steps = meter().create_counter("muxtune.steps", unit="{step}")
        self._seconds = meter().create_counter("muxtune.device_seconds", unit="s")
        self._wait = meter().create_gauge("muxtune.data_wait_fraction", unit="1")
        self._ends = meter().create_counter("muxtune.attempts_ended", unit="{attempt}")

    def record_wait(self, fraction: float) -> None:
        """Records the fraction of its time that the executor waits for microbatches."""
        self._wait.set(fraction, self._attributes)

    def record_results(self, results: Iterable[plan_pb2.TaskResult]) -> None:
        """Counts steps and evaluations as they end: one that runs again after a resume counts again."""
        for result in results:
            kind = result.WhichOneof("result")
            if kind in ("step_done", "evaluated"):
                work = result.step_done if kind == "step_done" else result.evaluated
                self._steps.add(int(kind == "step_done"), self._attributes)
                self._effective.add(work.effective_tokens, self._attributes)
                self._padding.add(work.padding_tokens, self._attributes)
                self._seconds.add(work.device_seconds, self._attributes)
            elif kind in ATTEMPT_ENDS:
                self._ends.add(1, {**self._attributes, "muxtune.end": kind})
