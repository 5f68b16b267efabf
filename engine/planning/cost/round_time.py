"""Tasks as fusion sees them, the stages they run over, and how long an hTask's round keeps those busy and takes itself.

Over S stages, an hTask whose round has n microbatches keeps each stage busy for `work` seconds, and its own round takes
at least

    latency = work * (1 + (S - 1) / n) + 2 (S - 1) hop                        (fill and drain of its own round)

because a task's next step needs its last one on every stage, while other hTasks' microbatches fill the wait.
Legend: X any shape of hypothetical hTasks, J choices of a round's number of microbatches, from the fewest there may be.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.planning.cost.cost_model import CostProfile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StepCost:
    """One optimizer step of a task: its tokens, the seconds it costs whoever it is fused with, and what its
    microbatches must hold: its longest sequence, and bytes kept for backward by a token."""

    name: str
    num_tokens: float
    extra_seconds: float = 0.0
    longest_tokens: int = 1
    token_bytes: float = 0.0


@dataclass(frozen=True)
class StageModel:
    """Where hTasks run: the model's profile split evenly over `num_stages`, `hop_seconds` between two of them, and what
    one microbatch may hold: tokens, and bytes kept for backward. Where hTasks' rounds do not interleave, a round keeps
    all stages from the others for as long as it takes itself."""

    profile: CostProfile
    max_tokens: int
    max_bytes: float = math.inf
    num_stages: int = 1
    hop_seconds: float = 0.0
    interleaves: bool = True

    def held_tokens(self, token_bytes: float) -> float:
        """Of a microbatch whose tokens keep so many bytes each."""
        held = self.max_bytes / token_bytes if token_bytes else math.inf
        return self.max_tokens if held >= self.max_tokens else math.floor(held)


@dataclass(frozen=True)
class Rounds:
    """[X, J]: microbatches a round, seconds of work on each stage and of latency. Infinite work: a sequence of it is
    longer than any microbatch may be."""

    number_XJ: Floats
    work_XJ: Floats
    latency_XJ: Floats


def round_times(tokens_X: Floats, extra_X: Floats, held_X: Floats, longest_X: Floats, stage: StageModel) -> Rounds:
    """Of hTasks of so many tokens and extra seconds in all, `held` of which fit a microbatch."""
    fewest_X = np.maximum(1, np.ceil(tokens_X / np.maximum(held_X, 1) - 1e-9))
    number_XJ: Floats = fewest_X[..., None] + np.arange(2.0 * stage.num_stages - 1)
    profile, others = stage.profile, stage.num_stages - 1
    busy_XJ = np.maximum(tokens_X[..., None], number_XJ * profile.knee_tokens)
    base_XJ = profile.fixed_seconds * number_XJ + profile.token_seconds * busy_XJ
    work_XJ = (base_XJ + extra_X[..., None]) / stage.num_stages
    latency_XJ = work_XJ * (1 + others / number_XJ) + 2 * others * stage.hop_seconds
    if not stage.interleaves:
        work_XJ = latency_XJ.copy()
    work_XJ[held_X < longest_X] = np.inf
    return Rounds(number_XJ, work_XJ, latency_XJ)
