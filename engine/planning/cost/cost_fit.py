"""Fits the prices of a cost profile to measured microbatches: non-negative least squares of relative errors per knee.

Non-negative prices make every prediction monotone in the work. Relative errors, because a plan compares microbatches
of all sizes. A second pass gives outliers (a busy machine) less weight.
Legend: N samples, F features.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.planning.cost.cost_model import MicrobatchWork, microbatch_seconds, total
from engine.planning.types import CostProfile

_OUTLIER = 3.0  # median absolute deviations
_NUM_KNEES = 24
_MIN_GAIN = 0.02  # relative error that a knee must save to be accepted


@dataclass(frozen=True)
class CostSample:
    """A measured microbatch: the work of each of its tasks, and the seconds it took."""

    parts: tuple[MicrobatchWork, ...]
    seconds: float


def fit(samples: Sequence[CostSample]) -> CostProfile:
    """Return the profile that explains the samples best. Raises ValueError without samples, or if one took 0 s."""
    if not samples or min(sample.seconds for sample in samples) <= 0:
        raise ValueError("a cost profile needs at least one sample, each with a positive time")
    wholes = [total(sample.parts) for sample in samples]
    seconds_N = np.array([sample.seconds for sample in samples])
    features_NF = np.array([_features(whole) for whole in wholes])
    tokens_N = features_NF[:, 1].copy()
    best = _fit_with_knee(features_NF, tokens_N, seconds_N, 0.0)
    error_without_knee = best.error
    for knee in np.geomspace(tokens_N.min(), tokens_N.max(), _NUM_KNEES + 2)[1:-1]:
        candidate = _fit_with_knee(features_NF, tokens_N, seconds_N, float(knee))
        if candidate.error < min(best.error, error_without_knee * (1 - _MIN_GAIN)):
            best = candidate
    return replace(best, error=error_of(best, samples))


def error_of(profile: CostProfile, samples: Sequence[CostSample]) -> float:
    """Return the median relative error of the profile on samples."""
    return statistics.median(abs(microbatch_seconds(profile, s.parts) / s.seconds - 1) for s in samples)


def refit(start: Sequence[CostSample], recent: Sequence[CostSample]) -> CostProfile:
    """Fit a profile to calibration samples, scaled to the speed of recent ones, and to the recent ones themselves.

    A machine gets slower or faster as a whole, and real microbatches are larger than calibration had time to try.
    Raises as `fit`.
    """
    calibrated = fit(start)
    if not recent:
        return calibrated
    ratio = statistics.median(sample.seconds / microbatch_seconds(calibrated, sample.parts) for sample in recent)
    return fit([*(CostSample(sample.parts, sample.seconds * ratio) for sample in start), *recent])


def _features(whole: MicrobatchWork) -> tuple[float, ...]:
    return (1.0, whole.num_tokens, whole.num_squared_tokens, whole.num_targets, whole.num_modules,
            whole.num_multiplications, whole.num_stepped_parameters, whole.num_segments)  # fmt: skip


def _fit_with_knee(
    features_NF: NDArray[np.float64], tokens_N: NDArray[np.float64], seconds_N: NDArray[np.float64], knee: float
) -> CostProfile:
    """Fit the prices for one knee. `error` is the root mean square of the weighted relative errors here."""
    bent_NF = features_NF.copy()
    bent_NF[:, 1] = np.maximum(tokens_N, knee)
    relative_NF = bent_NF / seconds_N[:, None]
    weights_N = np.ones(len(seconds_N))
    for _ in range(2):
        prices_F = nonnegative_least_squares(relative_NF * weights_N[:, None], weights_N)
        errors_N = np.abs(relative_NF @ prices_F - 1)
        spread = max(float(np.median(errors_N)), 1e-9)
        weights_N = np.minimum(1.0, _OUTLIER * spread / np.maximum(errors_N, 1e-12)) ** 0.5
    fixed, token, square, target, module, multiplication, parameter, segment = prices_F.tolist()
    rms = float(np.sqrt(np.mean((weights_N * errors_N) ** 2)))
    return CostProfile(fixed, token, knee, square, target, module, multiplication, parameter, segment, rms)


def nonnegative_least_squares(a_NF: NDArray[np.float64], b_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the x_F >= 0 that minimises |a x - b|, by active sets (Lawson and Hanson 1974, ch. 23)."""
    norms_F = np.linalg.norm(a_NF, axis=0)
    norms_F[norms_F == 0] = 1.0
    a_NF = a_NF / norms_F
    x_F, is_free_F = np.zeros(a_NF.shape[1]), np.zeros(a_NF.shape[1], bool)
    for _ in range(10 * len(x_F)):
        gradient_F = np.where(is_free_F, -np.inf, a_NF.T @ (b_N - a_NF @ x_F))
        if gradient_F.max() <= 1e-10 * np.linalg.norm(b_N):
            break
        is_free_F[gradient_F.argmax()] = True
        while is_free_F.any():
            trial_F = np.zeros_like(x_F)
            trial_F[is_free_F] = np.linalg.lstsq(a_NF[:, is_free_F], b_N, rcond=None)[0]
            if trial_F[is_free_F].min() > 0:
                x_F = trial_F
                break
            falling_F = is_free_F & (trial_F <= 0)
            step = float((x_F[falling_F] / np.maximum(x_F[falling_F] - trial_F[falling_F], 1e-300)).min())
            x_F = x_F + step * (trial_F - x_F)
            is_free_F &= x_F > 1e-14
            x_F[~is_free_F] = 0.0
    result_F: NDArray[np.float64] = x_F / norms_F
    return result_F
