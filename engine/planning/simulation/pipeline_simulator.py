"""Orders hTasks' microbatches for a pipeline (a template), and simulates the pipeline (by events).

The template runs hTasks' rounds one after another, in a cycle. An hTask's next round waits until its last one has
passed backward through the first stage: its steps are S stages apart, and the wait is filled with the other hTasks'
rounds. No order fills more: between an hTask's rounds of n of all N microbatches there can be at most N - n others, and
in a cycle of whole rounds there are N - n for every hTask at once. Neighbours in the cycle are alike in size (up, then
down), because a stage idles where a short microbatch follows a long one. A frozen backbone has no weight gradients to
fill bubbles with: only other hTasks' microbatches can. Source: MuxTune interleaves hTasks in time; the cycle and its
argument are ours. Legend: S stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HTaskRound:
    """A round of an hTask: its number of microbatches, and their seconds on each stage."""

    name: str
    num_microbatches: int
    forward_seconds: float
    backward_seconds: float

    @property
    def microbatch_seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of stages. Data takes `hop_seconds` from a stage to the next, while both compute.

    Stage s holds at most S - s + `num_extra` microbatches (1F1B has none extra; one hides hops).
    """

    num_stages: int
    hop_seconds: float = 0.0
    num_extra: int = 0


@dataclass(frozen=True)
class ScheduledMicrobatch:
    """A microbatch in the order in which they enter the first stage."""

    htask: HTaskRound
    round: int
    microbatch: int

    @property
    def is_first(self) -> bool:
        return self.microbatch == 0

    @property
    def is_last(self) -> bool:
        return self.microbatch == self.htask.num_microbatches - 1


@dataclass(frozen=True)
class StageOperation:
    """Forward or backward of a microbatch on one stage."""

    scheduled: ScheduledMicrobatch
    stage: int
    is_backward: bool
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """The operations of all stages, with their times."""

    pipeline: Pipeline
    operations: tuple[StageOperation, ...]

    @property
    def seconds(self) -> float:
        return max((o.end_seconds for o in self.operations), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """Share of all stages' time in which they compute nothing, filling and draining included."""
        busy = sum(o.end_seconds - o.start_seconds for o in self.operations)
        return 1 - busy / (self.pipeline.num_stages * self.seconds) if self.operations else 0.0


def interleaved(htasks: Sequence[HTaskRound], num_rounds: int) -> list[ScheduledMicrobatch]:
    """Return the template's order: all hTasks' rounds in a cycle, in which microbatches' sizes rise, then fall."""
    rising = sorted(htasks, key=lambda htask: (htask.microbatch_seconds, htask.name))
    return _in_cycles(rising[::2] + rising[1::2][::-1], num_rounds)


def one_by_one(htasks: Sequence[HTaskRound], num_rounds: int) -> list[ScheduledMicrobatch]:
    """Return the ablation's order: all rounds of an hTask, then those of the next."""
    return [microbatch for htask in htasks for microbatch in _in_cycles([htask], num_rounds)]


def _in_cycles(cycle: Sequence[HTaskRound], num_rounds: int) -> list[ScheduledMicrobatch]:
    return [
        ScheduledMicrobatch(htask, r, m)
        for r in range(num_rounds)
        for htask in cycle
        for m in range(htask.num_microbatches)
    ]


def simulate(order: Sequence[ScheduledMicrobatch], pipeline: Pipeline) -> Timeline:
    """Run microbatches in this order. A stage that can run both prefers backward to forward."""
    stages = [_Stage(s, pipeline, len(order)) for s in range(pipeline.num_stages)]
    returned: dict[tuple[str, int], float] = {}  # when a round passed backward through the first stage
    operations: list[StageOperation] = []
    while len(operations) < 2 * len(order) * pipeline.num_stages:
        start, number, is_backward = min(_next(stage, order, returned) for stage in stages)
        stage = stages[number]
        microbatch = order[stage.num_backward if is_backward else stage.num_forward]
        end = start + (microbatch.htask.backward_seconds if is_backward else microbatch.htask.forward_seconds)
        operations.append(StageOperation(microbatch, number, is_backward, start, end))
        stage.free_seconds = end
        if is_backward:
            stage.num_backward += 1
            if number:
                stages[number - 1].gradients.append(end + pipeline.hop_seconds)
            elif microbatch.is_last:
                returned[microbatch.htask.name, microbatch.round] = end
        else:
            stage.num_forward += 1
            if number + 1 < len(stages):
                stages[number + 1].inputs.append(end + pipeline.hop_seconds)
            else:
                stage.gradients.append(end)
    return Timeline(pipeline, tuple(operations))


class _Stage:
    """Progress of a stage, which runs microbatches in order, forward and backward."""

    def __init__(self, number: int, pipeline: Pipeline, num_microbatches: int) -> None:
        self.number = number
        self.capacity = pipeline.num_stages - number + pipeline.num_extra
        self.num_forward = self.num_backward = 0
        self.free_seconds = 0.0
        self.inputs: list[float] = [0.0] * num_microbatches if number == 0 else []  # times of arrival
        self.gradients: list[float] = []


def _next(
    stage: _Stage, order: Sequence[ScheduledMicrobatch], returned: dict[tuple[str, int], float]
) -> tuple[float, int, bool]:
    """Return (start, stage, whether backward) of the operation that the stage could run next; start inf: none yet."""
    backward = forward = math.inf
    if stage.num_backward < len(stage.gradients):
        backward = max(stage.free_seconds, stage.gradients[stage.num_backward])
    if stage.num_forward < len(stage.inputs) and stage.num_forward - stage.num_backward < stage.capacity:
        forward = max(stage.free_seconds, stage.inputs[stage.num_forward])
        microbatch = order[stage.num_forward]
        if stage.number == 0 and microbatch.is_first and microbatch.round > 0:
            forward = max(forward, returned.get((microbatch.htask.name, microbatch.round - 1), math.inf))
    return (backward, stage.number, True) if backward <= forward else (forward, stage.number, False)
