"""What one task asks of any executor of its backbone, worked out once a plan: bytes, and one step as the cost model
sees it."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from engine.planning.cost.chunk_size import SequenceLengths, allowed_padding_tokens, choose_chunk
from engine.planning.cost.cost_model import AdapterLoad, CostProfile, Part, adapter_load
from engine.planning.cost.memory_model import Footprint, footprint
from engine.planning.cost.round_time import StepCost
from engine.planning.types import BackboneView, PlannerConfig, TaskView
from engine.task import Affects, TaskSpec, values_affecting


@dataclass(frozen=True)
class TaskDemand:
    """`step`: one optimizer step of the task, padding included; `ragged`: its sequences."""

    task: TaskView
    footprint: Footprint
    step: Part
    ragged: SequenceLengths

    def seconds(self, profile: CostProfile) -> float:
        """What a step costs an executor that is busy anyway: the task's claim on it."""
        return profile.token_seconds * self.step.num_tokens + profile.extra_seconds(self.step)

    def job(self, profile: CostProfile) -> StepCost:
        return StepCost(self.task.name, self.step.num_tokens, profile.extra_seconds(self.step),
                   self.footprint.sequence_tokens, self.footprint.kept_bytes)  # fmt: skip


class DemandEstimator:
    """Works out needs, and remembers them for as long as it lives: most of a need depends on the spec alone."""

    def __init__(self, limits: PlannerConfig) -> None:
        self._limits = limits
        self._needs: dict[tuple[str, str], TaskDemand] = {}
        self._methods: dict[tuple[str, str], AdapterLoad] = {}
        self._footprints: dict[tuple[object, ...], Footprint] = {}

    def need(self, task: TaskView, backbone: BackboneView) -> TaskDemand:
        """Raises InvalidInputError if the task's method names what the backbone has not."""
        key = task.name, backbone.name
        known = self._needs.get(key)
        if known is None or known.task.spec != task.spec:
            method = repr(task.spec.method), backbone.name
            if method not in self._methods:
                self._methods[method] = adapter_load(task.spec.method, backbone.sites)
            ragged = _ragged(task)
            step = _step(task, ragged, self._methods[method], self._limits)
            known = TaskDemand(task, self._footprint(task.spec, backbone), step, ragged)
        elif known.task is not task:
            known = replace(known, task=task)
        self._needs[key] = known
        return known

    def _footprint(self, spec: TaskSpec, backbone: BackboneView) -> Footprint:
        key = (repr(spec.method), backbone.name, values_affecting(spec.training, Affects.MEMORY))
        if key not in self._footprints:
            self._footprints[key] = footprint(spec, backbone)
        return self._footprints[key]

    def forget_all_but(self, tasks: Collection[str]) -> None:
        self._needs = {key: need for key, need in self._needs.items() if key[0] in tasks}


def _ragged(task: TaskView) -> SequenceLengths:
    """One step's sequences, virtual tokens included."""
    training, virtual = task.spec.training, task.spec.method.num_virtual_tokens
    sequences = max(1, training.global_batch_size)
    lengths = tuple(length + virtual for length in task.length_quantiles)
    slices = math.ceil(sequences / max(1, training.micro_batch_size))
    return SequenceLengths(lengths, sequences, slices, task.tokens_per_step + sequences * virtual)


def _step(task: TaskView, ragged: SequenceLengths, load: AdapterLoad, limits: PlannerConfig) -> Part:
    """An average step, were the task alone. Every position is taken to bear loss; sequences whose lengths are not known
    are taken to be of one."""
    tokens, sequences = ragged.num_tokens, ragged.num_sequences
    ranges = min(ragged.num_slices, max(1, math.ceil(tokens / limits.token_budget)))
    chunk = limits.chunk_tokens or choose_chunk([ragged], ranges, allowed_padding_tokens(tokens, ranges))
    padded = tokens + ragged.padding_tokens(ranges, chunk)
    mean = tokens / sequences
    square = sum(length * length for length in ragged.lengths) / len(ragged.lengths) if ragged.lengths else mean * mean
    return Part(
        num_tokens=padded,
        num_squared_tokens=square * sequences,
        num_targets=task.tokens_per_step,
        num_modules=ranges * load.num_modules,
        num_multiplications=padded * load.num_multiplications,
        num_stepped_parameters=load.num_parameters,
        num_segments=sequences,
    )
