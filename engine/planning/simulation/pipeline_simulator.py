"""In what order hTasks' microbatches enter a pipeline, and what comes of it: a template, and an event simulator.

The template runs hTasks' rounds one after another, in a cycle. An hTask's next round waits until its last one has
passed backward through the first stage: its steps are S stages apart, and the wait is filled with the other hTasks'
rounds. No order fills more: between an hTask's rounds of n of all N microbatches there can be at most N - n others, and
in a cycle of whole rounds there are N - n for every hTask at once. Neighbours in the cycle are alike in size (up, then
down), because a stage idles where a short microbatch follows a long one. A frozen backbone has no weight gradients to
fill bubbles with: others' microbatches are all there is. Source: MuxTune interleaves hTasks in time; the cycle and its
argument are ours. Legend: S stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """An hTask's round on each stage: so many microbatches of so many seconds."""

    name: str
    num_microbatches: int
    forward_seconds: float
    backward_seconds: float

    @property
    def microbatch_seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Pipeline:
    """`hop_seconds` from a stage to the next, beside computing. Stage s holds at most S - s + `num_extra` microbatches
    (1F1B has none extra; one hides hops)."""

    num_stages: int
    hop_seconds: float = 0.0
    num_extra: int = 0


@dataclass(frozen=True)
class Entry:
    """A microbatch in the order of the first stage."""

    load: Load
    round: int
    microbatch: int

    @property
    def is_first(self) -> bool:
        return self.microbatch == 0

    @property
    def is_last(self) -> bool:
        return self.microbatch == self.load.num_microbatches - 1


@dataclass(frozen=True)
class Operation:
    """A microbatch on one stage, from `start_seconds` to `end_seconds`."""

    entry: Entry
    stage: int
    is_backward: bool
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """What each stage did when."""

    pipeline: Pipeline
    operations: tuple[Operation, ...]

    @property
    def seconds(self) -> float:
        return max((o.end_seconds for o in self.operations), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """Of all stages' time, filling and draining included, the part in which they computed nothing."""
        busy = sum(o.end_seconds - o.start_seconds for o in self.operations)
        return 1 - busy / (self.pipeline.num_stages * self.seconds) if self.operations else 0.0


def interleaved(loads: Sequence[Load], num_rounds: int) -> list[Entry]:
    """The template: all hTasks' rounds in a cycle, sizes rising and falling."""
    rising = sorted(loads, key=lambda load: (load.microbatch_seconds, load.name))
    cycle = rising[::2] + rising[1::2][::-1]
    return [Entry(load, r, m) for r in range(num_rounds) for load in cycle for m in range(load.num_microbatches)]


def one_by_one(loads: Sequence[Load], num_rounds: int) -> list[Entry]:
    """The ablation: each hTask's rounds, then the next one's."""
    return [Entry(load, r, m) for load in loads for r in range(num_rounds) for m in range(load.num_microbatches)]


def simulate(order: Sequence[Entry], pipeline: Pipeline) -> Timeline:
    """Runs microbatches in that order: on each stage backward before forward where both can run."""
    stages = [_Stage(s, pipeline, len(order)) for s in range(pipeline.num_stages)]
    returned: dict[tuple[str, int], float] = {}  # when a round had passed backward through the first stage
    operations: list[Operation] = []
    while len(operations) < 2 * len(order) * pipeline.num_stages:
        start, stage, is_backward = min(_next(stage, order, returned) for stage in stages)
        here = stages[stage]
        index = here.num_backward if is_backward else here.num_forward
        entry = order[index]
        end = start + (entry.load.backward_seconds if is_backward else entry.load.forward_seconds)
        operations.append(Operation(entry, stage, is_backward, start, end))
        here.free_seconds = end
        if is_backward:
            here.num_backward += 1
            if stage:
                stages[stage - 1].gradients.append(end + pipeline.hop_seconds)
            elif entry.is_last:
                returned[entry.load.name, entry.round] = end
        else:
            here.num_forward += 1
            if stage + 1 < len(stages):
                stages[stage + 1].inputs.append(end + pipeline.hop_seconds)
            else:
                here.gradients.append(end)
    return Timeline(pipeline, tuple(operations))


class _Stage:
    """How far a stage is: it takes microbatches in order, forward and backward."""

    def __init__(self, number: int, pipeline: Pipeline, num_microbatches: int) -> None:
        self.number = number
        self.capacity = pipeline.num_stages - number + pipeline.num_extra
        self.num_forward = self.num_backward = 0
        self.free_seconds = 0.0
        self.inputs: list[float] = [0.0] * num_microbatches if number == 0 else []  # when they had arrived
        self.gradients: list[float] = []


def _next(stage: _Stage, order: Sequence[Entry], returned: dict[tuple[str, int], float]) -> tuple[float, int, bool]:
    """(start, stage, whether backward) of what the stage could run next; infinitely late: nothing yet."""
    backward = forward = math.inf
    if stage.num_backward < len(stage.gradients):
        backward = max(stage.free_seconds, stage.gradients[stage.num_backward])
    if stage.num_forward < len(stage.inputs) and stage.num_forward - stage.num_backward < stage.capacity:
        forward = max(stage.free_seconds, stage.inputs[stage.num_forward])
        entry = order[stage.num_forward]
        if stage.number == 0 and entry.is_first and entry.round > 0:
            forward = max(forward, returned.get((entry.load.name, entry.round - 1), math.inf))
    return (backward, stage.number, True) if backward <= forward else (forward, stage.number, False)
