"""What one task asks of any executor of its backbone, worked out once a plan: bytes, and one step as the cost model
sees it."""

import math
from dataclasses import dataclass, field

from engine.planning.cost import AdapterLoad, CostProfile, Part, adapter_load
from engine.planning.fusion import Job
from engine.planning.memory import Footprint, footprint
from engine.planning.plan import BackboneView, Limits, TaskView


@dataclass(frozen=True)
class Need:
    """`step`: one optimizer step of the task, padding included."""

    task: TaskView
    footprint: Footprint
    step: Part

    def seconds(self, profile: CostProfile) -> float:
        """What a step costs an executor that is busy anyway: the task's claim on it."""
        return profile.scale * profile.token_seconds * self.step.num_tokens + profile.extra_seconds(self.step)

    def job(self, profile: CostProfile) -> Job:
        return Job(self.task.name, self.step.num_tokens, profile.extra_seconds(self.step),
                   self.footprint.sequence_tokens, self.footprint.kept_bytes)  # fmt: skip


@dataclass
class Appraiser:
    """Works out needs; remembers what depends on the spec alone, by method and backbone, for as long as it lives."""

    limits: Limits
    _known: dict[tuple[str, str, str], tuple[Footprint, AdapterLoad]] = field(default_factory=dict)

    def need(self, task: TaskView, backbone: BackboneView) -> Need:
        """Raises InvalidInputError if the task's method names what the backbone has not."""
        key = (repr(task.spec.method), repr(task.spec.training), backbone.name)
        if key not in self._known:
            self._known[key] = footprint(task.spec, backbone), adapter_load(task.spec.method, backbone.sites)
        held, load = self._known[key]
        return Need(task, held, _step(task, load, self.limits))


def _step(task: TaskView, load: AdapterLoad, limits: Limits) -> Part:
    """An average step. Its sequences are taken to be of one length, and every position to bear loss."""
    training = task.spec.training
    sequences = max(1, training.global_batch_size)
    tokens = task.tokens_per_step + sequences * task.spec.method.num_virtual_tokens
    slices = math.ceil(sequences / max(1, training.micro_batch_size))
    ranges = min(slices, max(1, math.ceil(tokens / limits.token_budget)))
    padded = tokens + ranges * (limits.chunk_tokens - 1) / 2
    return Part(
        num_tokens=padded,
        num_squared_tokens=tokens * tokens / sequences,
        num_targets=task.tokens_per_step,
        num_modules=ranges * load.num_modules,
        num_multiplications=padded * load.num_multiplications,
        num_stepped_parameters=load.num_parameters,
    )
