"""Records fused steps as spans: one span for a window of microbatches, linked to the traces of all its tasks.

No span stays open for long, and none holds more than counts.
"""

import time

from opentelemetry.trace import Span

from engine.alignment.microbatch import Microbatch
from services.telemetry import links_to, tracer

_WINDOW_SECONDS = 5.0
_RATE_WEIGHT = 0.1
_DECAY = 0.99  # of earlier waits and runs, at each microbatch
_TOTALS = ("microbatches", "effective_tokens", "padding_tokens", "run_seconds", "wait_seconds")


class StepWindow:
    """Sums up microbatches for a span, and keeps two moving averages.

    These are the executor's throughput, and the fraction of its time that it waits for microbatches.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._recent_wait = self._recent_run = 0.0  # seconds, decaying
        self._span: Span | None = None
        self._key: tuple[object, ...] = ()
        self._started = 0.0
        self._totals = dict.fromkeys(_TOTALS, 0.0)

    @property
    def wait_fraction(self) -> float:
        return self._recent_wait / max(1e-9, self._recent_wait + self._recent_run)

    def add_wait(self, seconds: float) -> None:
        """Records a wait for microbatches while nothing ran."""
        self._recent_wait += seconds
        self._totals["wait_seconds"] += seconds

    def add(
        self, microbatch: Microbatch, seconds: float, plan_version: int, trace_parents: list[tuple[str, str]]
    ) -> None:
        """Records a microbatch that took `seconds`. A new plan or another set of tasks starts a new window."""
        effective = sum(range_.num_effective_tokens for range_ in microbatch.ranges)
        rate = effective / max(seconds, 1e-9)
        self.tokens_per_second += (1.0 if not self.tokens_per_second else _RATE_WEIGHT) * (
            rate - self.tokens_per_second
        )
        key = (plan_version, *(task for task, _ in trace_parents))
        if self._span is not None and (key != self._key or time.monotonic() - self._started > _WINDOW_SECONDS):
            self.close()
        if self._span is None:
            self._open(key, plan_version, trace_parents)
        self._recent_wait = _DECAY * self._recent_wait
        self._recent_run = _DECAY * (self._recent_run + seconds)
        self._totals["run_seconds"] += seconds
        self._totals["microbatches"] += 1
        self._totals["effective_tokens"] += effective
        self._totals["padding_tokens"] += microbatch.num_tokens - effective

    def close(self) -> None:
        """Ends the span of the window, if one is open."""
        if self._span is not None:
            for name, total in self._totals.items():
                self._span.set_attribute(f"muxtune.{name}", total if name.endswith("_seconds") else int(total))
            self._span.end()
            self._span, self._totals = None, dict.fromkeys(_TOTALS, 0.0)

    def _open(self, key: tuple[object, ...], plan_version: int, trace_parents: list[tuple[str, str]]) -> None:
        attributes = {"muxtune.plan_version": plan_version, "muxtune.num_tasks": len(trace_parents)}
        self._span = tracer().start_span("fused steps", links=links_to(trace_parents), attributes=attributes)
        self._key, self._started = key, time.monotonic()
