"""When a task ends before its last step: its held-out loss has stopped getting better. Pure.

Source: the usual patience rule (as transformers' EarlyStoppingCallback): an evaluation improves if it is below the best
so far by more than `min_delta`; after `patience` evaluations in a row that don't, stop.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from engine.task import Training


@dataclass(frozen=True)
class EarlyStop:
    """What has been seen so far. `best_loss` None: nothing finite yet."""

    best_loss: float | None = None
    best_step: int = 0
    last_step: int = -1
    num_without_improvement: int = 0

    def after(self, step: int, loss: float, training: Training) -> "EarlyStop":
        """With one more evaluation. One that was seen before (a resumed task repeats it) changes nothing."""
        if step <= self.last_step:
            return self
        if self.best_loss is None or loss < self.best_loss - training.early_stop_min_delta:
            best = loss if math.isfinite(loss) else None
            return EarlyStop(best, step, step, 0 if best is not None else self.num_without_improvement + 1)
        return EarlyStop(self.best_loss, self.best_step, step, self.num_without_improvement + 1)

    def reason(self, training: Training) -> str:
        """Why the task should end now; empty: it should go on."""
        patience = training.early_stop_patience
        if patience <= 0 or self.num_without_improvement < patience:
            return ""
        best = "never finite" if self.best_loss is None else f"best {self.best_loss:.6g} at step {self.best_step}"
        return f"early stop: {self.num_without_improvement} evaluations without improvement ({best})"

    def to_metadata(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any] | None) -> "EarlyStop":
        return cls(**metadata) if metadata else cls()
