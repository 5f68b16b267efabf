"""Decides when a task ends early: when its held-out loss has stopped improving. Pure."""

import math
from dataclasses import dataclass, replace

from engine.task import Training


@dataclass(frozen=True)
class EarlyStop:
    """Holds the best held-out loss so far and the number of evaluations since. Checkpoints include this state."""

    best: float | None = None
    num_without_improvement: int = 0
    evaluated_step: int = -1

    def after(self, training: Training, step: int, loss: float) -> "EarlyStop":
        """Returns the state after the evaluation at `step`.

        An evaluation that was counted before (the task was resumed) changes nothing; NaN never improves.
        """
        if step <= self.evaluated_step:
            return self
        if math.isfinite(loss) and (self.best is None or loss < self.best - training.early_stop_min_delta):
            return EarlyStop(loss, 0, step)
        return replace(self, num_without_improvement=self.num_without_improvement + 1, evaluated_step=step)

    def should_stop(self, training: Training) -> bool:
        return 0 < training.early_stop_patience <= self.num_without_improvement

    def describe(self, step: int) -> str:
        bound = "finite" if self.best is None else f"under {self.best:.4f}"
        return f"early stop after {step} steps: the held-out loss is no longer {bound}"
