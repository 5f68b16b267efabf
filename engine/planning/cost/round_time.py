"""Time of an hTask's round: how long it keeps each pipeline stage busy, and how long it takes itself.

Over S stages, an hTask whose round has n microbatches keeps each stage busy for `work` seconds, and its own round takes
at least

    latency = work * (1 + (S - 1) / n) + 2 (S - 1) hop                        (fill and drain of its own round)

because a task's next step needs its last one on every stage, while other hTasks' microbatches fill the wait.
Legend: X any shape of hypothetical hTasks, J choices of a round's number of microbatches, from the fewest possible.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.planning.types import CostProfile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StepCost:
    """One optimizer step of a task, as fusion sees it.

    `num_tokens` share microbatches with other tasks; `extra_seconds` are the same with any of them. A microbatch must
    hold the longest sequence, and keeps `token_bytes` of each token for backward.
    """

    name: str
    num_tokens: float
    extra_seconds: float = 0.0
    longest_tokens: int = 1
    token_bytes: float = 0.0


@dataclass(frozen=True)
class StageModel:
    """A pipeline that runs hTasks: costs split evenly over `num_stages`, `hop_seconds` between two of them.

    A microbatch holds at most `max_tokens`, and `max_bytes` kept for backward. If hTasks' rounds do not interleave, a
    round blocks all stages for the others for as long as it takes itself.
    """

    profile: CostProfile
    max_tokens: int
    max_bytes: float = math.inf
    num_stages: int = 1
    hop_seconds: float = 0.0
    interleaves: bool = True

    def held_tokens(self, token_bytes: float) -> float:
        """Return how many tokens a microbatch holds if each keeps `token_bytes`."""
        held = self.max_bytes / token_bytes if token_bytes else math.inf
        return self.max_tokens if held >= self.max_tokens else math.floor(held)


@dataclass(frozen=True)
class RoundTimes:
    """Rounds of hypothetical hTasks [X, J]: microbatches, seconds of work on each stage, seconds of latency.

    Infinite work marks an hTask with a sequence that no microbatch can hold.
    """

    number_XJ: Floats
    work_XJ: Floats
    latency_XJ: Floats


def round_times(tokens_X: Floats, extra_X: Floats, held_X: Floats, longest_X: Floats, stage: StageModel) -> RoundTimes:
    """Return the round times of hTasks with these totals of tokens and extra seconds; a microbatch holds `held_X`."""
    number_XJ: Floats = fewest_microbatches(tokens_X, held_X)[..., None] + np.arange(2.0 * stage.num_stages - 1)
    work_XJ, latency_XJ = _work_and_latency(number_XJ, tokens_X, extra_X, stage)
    if not stage.interleaves:
        work_XJ = latency_XJ.copy()
    work_XJ[held_X < longest_X] = np.inf
    return RoundTimes(number_XJ, work_XJ, latency_XJ)


def fewest_microbatches(tokens_X: Floats, held_X: Floats) -> Floats:
    """Return the fewest microbatches that hold these tokens."""
    fewest_X: Floats = np.maximum(1, np.ceil(tokens_X / np.maximum(held_X, 1) - 1e-9))
    return fewest_X


def all_base_seconds(profile: CostProfile, tokens_X: Floats, number_X: Floats) -> Floats:
    """Return `cost_model.base_seconds` of each round."""
    busy_X = np.maximum(tokens_X, number_X * profile.knee_tokens)
    seconds_X: Floats = profile.fixed_seconds * number_X + profile.token_seconds * busy_X
    return seconds_X


def least_latency(tokens_X: Floats, extra_X: Floats, fewest_X: Floats, most: float, stage: StageModel) -> Floats:
    """Return the least latency [X] over all numbers of microbatches from `fewest_X` to `most`.

    Below and above the knee, latency is a n + b + c / n in the number n: convex, and so is the larger of the two. Its
    least is at an end, at the least of either, or where they meet; n is whole, so next to it.
    """
    profile, other_stages = stage.profile, stage.num_stages - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        below_X = np.sqrt(other_stages * (profile.token_seconds * tokens_X + extra_X) / profile.fixed_seconds)
        per_microbatch = profile.fixed_seconds + profile.token_seconds * profile.knee_tokens
        above_X = np.sqrt(other_stages * extra_X / per_microbatch)
        knee_X = tokens_X / profile.knee_tokens
    whole = [np.nan_to_num(round_(x), nan=most) for x in (below_X, above_X, knee_X) for round_ in (np.floor, np.ceil)]
    number_XJ = np.stack([fewest_X, np.full_like(fewest_X, most), *whole], axis=-1)
    _, latency_XJ = _work_and_latency(np.clip(number_XJ, fewest_X[..., None], most), tokens_X, extra_X, stage)
    least_X: Floats = latency_XJ.min(axis=-1)
    return least_X


def _work_and_latency(number_XJ: Floats, tokens_X: Floats, extra_X: Floats, stage: StageModel) -> tuple[Floats, Floats]:
    profile, other_stages = stage.profile, stage.num_stages - 1
    base_XJ = all_base_seconds(profile, tokens_X[..., None], number_XJ)
    work_XJ = (base_XJ + extra_X[..., None]) / stage.num_stages
    return work_XJ, work_XJ * (1 + other_stages / number_XJ) + 2 * other_stages * stage.hop_seconds
