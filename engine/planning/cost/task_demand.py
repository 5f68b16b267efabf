"""Demand of a task: memory and step time that it needs on any executor of its backbone."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from engine.planning.cost.chunk_size import SequenceLengths, allowed_padding_tokens, choose_chunk
from engine.planning.cost.cost_model import AdapterLoad, MicrobatchWork, adapter_load, base_seconds, extra_seconds
from engine.planning.cost.memory_model import TaskFootprint, footprint
from engine.planning.cost.round_time import StepCost
from engine.planning.types import BackboneView, CostProfile, PlannerConfig, TaskView
from engine.task import EVALUATION_COST, Affects, TaskSpec, num_evaluations, values_affecting

_MAX_CACHED = 4096  # adapters, and footprints: of more it is cheaper to compute some again than to keep all


@dataclass(frozen=True)
class TaskDemand:
    """Memory and step time that a task demands of any executor of its backbone; computed once for each plan.

    `step`: the work of one optimizer step, padding included; `sequences`: the lengths of its sequences.
    `evaluation`: the work of one evaluation, if it trained.
    """

    task: TaskView
    footprint: TaskFootprint
    step: MicrobatchWork
    sequences: SequenceLengths
    evaluation: MicrobatchWork

    @property
    def between_steps(self) -> tuple[tuple[MicrobatchWork, float], ...]:
        """Work that runs between the task's steps, and how often on average for each step that is left.

        Evaluations count by their cost, compared with training. A step that is verified runs a second time.
        """
        training, steps_left = self.task.spec.training, max(1, self.task.num_steps_left)
        evaluations = num_evaluations(training, self.task.num_steps, self.task.step) / steps_left
        verifications = 1 / training.verify_every_steps if training.verify_every_steps else 0.0
        return (self.evaluation, EVALUATION_COST * evaluations), (self.step, verifications)

    def seconds(self, profile: CostProfile) -> float:
        """Return the seconds that a step and the work between steps add to an executor that is busy anyway: the task's
        claim on it."""
        return sum(
            times * (profile.token_seconds * work.num_tokens + extra_seconds(profile, work))
            for work, times in ((self.step, 1.0), *self.between_steps)
        )

    def seconds_between_steps(self, profile: CostProfile, microbatch_tokens: int) -> float:
        """Return the mean seconds of the work between two steps, in microbatches of its own."""
        return sum(
            times
            * (
                base_seconds(profile, work.num_tokens, math.ceil(work.num_tokens / microbatch_tokens))
                + extra_seconds(profile, work)
            )
            for work, times in self.between_steps
        )

    def step_cost(self, profile: CostProfile) -> StepCost:
        return StepCost(self.task.name, self.step.num_tokens, extra_seconds(profile, self.step),
                        self.footprint.sequence_tokens, self.footprint.saved_token_bytes)  # fmt: skip


class DemandEstimator:
    """Estimates demands and caches them for as long as it lives: most of a demand depends on the spec alone."""

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._demands: dict[tuple[str, str], TaskDemand] = {}
        self._loads: dict[tuple[str, str], AdapterLoad] = {}
        self._footprints: dict[tuple[object, ...], TaskFootprint] = {}
        self._refusals: dict[str, tuple[TaskSpec, object, str]] = {}

    def find(self, task: TaskView, backbone: BackboneView) -> TaskDemand | None:
        """Return the task's demand if it is in the cache."""
        demand = self._demands.get((task.name, backbone.name))
        return demand if demand is not None and demand.task.spec == task.spec else None

    def find_refusal(self, task: TaskView, executors: object) -> str:
        """Return why none of the executors can run the task if that was found before, else ""."""
        spec, seen, reason = self._refusals.get(task.name, (None, None, ""))
        return reason if spec == task.spec and seen == executors else ""

    def keep_refusal(self, task: TaskView, executors: object, reason: str) -> None:
        """Keep the reason: a remedy takes a hundred times as long to find as a demand."""
        self._refusals[task.name] = task.spec, executors, reason

    def estimate(self, task: TaskView, backbone: BackboneView) -> TaskDemand:
        """Return the task's demand. Raises InvalidInputError if its method names a module that the backbone lacks."""
        demand = self.find(task, backbone)
        if demand is None:
            method = repr(task.spec.method), backbone.name
            if method not in self._loads:
                self._loads[method] = adapter_load(task.spec.method, backbone.sites)
            sequences, load = _sequences(task), self._loads[method]
            step = _step(task, sequences, load, self._config)
            evaluation = _evaluation(task, sequences, load, self._config)
            demand = TaskDemand(task, self._footprint(task.spec, backbone), step, sequences, evaluation)
        elif demand.task is not task:
            demand = replace(demand, task=task)
        self._demands[task.name, backbone.name] = demand
        return demand

    def _footprint(self, spec: TaskSpec, backbone: BackboneView) -> TaskFootprint:
        key = (repr(spec.method), backbone.name, values_affecting(spec.training, Affects.MEMORY))
        if key not in self._footprints:
            self._footprints[key] = footprint(spec, backbone)
        return self._footprints[key]

    def forget_all_but(self, tasks: Collection[str]) -> None:
        self._demands = {key: demand for key, demand in self._demands.items() if key[0] in tasks}
        self._refusals = {name: refusal for name, refusal in self._refusals.items() if name in tasks}
        for cache in (self._loads, self._footprints):
            if len(cache) > _MAX_CACHED:
                cache.clear()


def _sequences(task: TaskView) -> SequenceLengths:
    """Return the sequences of one step, virtual tokens included."""
    training, virtual_tokens = task.spec.training, task.spec.method.num_virtual_tokens
    num_sequences = max(1, training.global_batch_size)
    lengths = tuple(length + virtual_tokens for length in task.length_quantiles)
    num_slices = math.ceil(num_sequences / max(1, training.micro_batch_size))
    return SequenceLengths(lengths, num_sequences, num_slices, task.tokens_per_step + num_sequences * virtual_tokens)


def _step(task: TaskView, sequences: SequenceLengths, load: AdapterLoad, config: PlannerConfig) -> MicrobatchWork:
    """Return the work of an average step of the task without neighbours.

    Every position is assumed to bear loss. Sequences of unknown lengths are assumed to be equally long.
    """
    tokens, count = sequences.num_tokens, sequences.num_sequences
    ranges = min(sequences.num_slices, max(1, math.ceil(tokens / config.token_budget)))
    chunk = config.chunk_tokens or choose_chunk([sequences], ranges, allowed_padding_tokens(tokens, ranges))
    padded_tokens = tokens + sequences.padding_tokens(ranges, chunk)
    return MicrobatchWork(
        num_tokens=padded_tokens,
        num_squared_tokens=_mean_square(sequences) * count,
        num_targets=task.tokens_per_step,
        num_modules=ranges * load.num_modules,
        num_multiplications=padded_tokens * load.num_multiplications,
        num_stepped_parameters=load.num_parameters,
        num_segments=count,
    )


def _evaluation(task: TaskView, sequences: SequenceLengths, load: AdapterLoad, config: PlannerConfig) -> MicrobatchWork:
    """Return the work of one evaluation of the task, if it trained. Padding is neglected: many rows share a tail."""
    count = task.num_heldout_rows
    tokens = task.num_heldout_tokens + count * task.spec.method.num_virtual_tokens
    return MicrobatchWork(
        num_tokens=tokens,
        num_squared_tokens=_mean_square(sequences) * count,
        num_targets=task.num_heldout_tokens,
        num_modules=math.ceil(tokens / config.token_budget) * load.num_modules,
        num_multiplications=tokens * load.num_multiplications,
        num_segments=count,
    )


def _mean_square(sequences: SequenceLengths) -> float:
    lengths = sequences.lengths or (sequences.num_tokens / sequences.num_sequences,)
    return sum(length * length for length in lengths) / len(lengths)
