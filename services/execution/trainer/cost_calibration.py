"""Calibrates the cost model when the trainer starts, and fits it again to the microbatches that run."""

import logging
import time
from collections import deque

from engine.alignment.microbatch import Microbatch, MicrobatchKind
from engine.planning.cost.cost_fit import CostSample, refit
from engine.planning.cost.cost_model import MicrobatchWork
from engine.planning.types import CostProfile
from engine.runtime.calibration import calibrate, parts_of
from engine.runtime.executor import Executor

_MAX_TOKENS = 4096  # of a calibration microbatch
_NUM_RECENT, _REFIT_EVERY = 96, 16
_REFIT_SECONDS = 1.0  # between two fits at least: they take milliseconds, as small microbatches do
_log = logging.getLogger(__name__)


class CostCalibration:
    """Holds the newest cost `profile`. A fit takes milliseconds, between two microbatches."""

    def __init__(self, executor: Executor, budget_seconds: float) -> None:
        self._executor = executor
        self._start = calibrate(executor, budget_seconds, _MAX_TOKENS)
        self._recent: deque[CostSample] = deque(maxlen=_NUM_RECENT)
        self._num_new, self._fitted = 0, 0.0
        self.profile: CostProfile = refit(self._start, ())
        _log.info("The cost model is calibrated: %s", self.profile)

    def parts(self, microbatch: Microbatch) -> tuple[MicrobatchWork, ...]:
        """Returns the microbatch's parts for the cost model.

        Call it before the microbatch runs, after which tasks may have ended.
        """
        return parts_of(microbatch, self._executor)

    def add(self, microbatch: Microbatch, parts: tuple[MicrobatchWork, ...], seconds: float) -> None:
        """Records how long a microbatch took. Evaluations are ignored: they have no backward pass."""
        if microbatch.kind is not MicrobatchKind.TRAIN or seconds <= 0:
            return
        self._recent.append(CostSample(parts, seconds))
        self._num_new += 1
        if self._num_new >= _REFIT_EVERY and time.monotonic() - self._fitted >= _REFIT_SECONDS:
            self._num_new, self._fitted = 0, time.monotonic()
            self.profile = refit(self._start, self._recent)
