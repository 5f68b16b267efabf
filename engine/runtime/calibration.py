"""Measures in a few seconds what microbatches cost on this executor: a few sizes, and variations of one of them.

It times temporary tasks, which it detaches at the end. `engine.planning.cost.cost_fit` fits the costs.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.methods import Lora
from engine.methods.base import SiteKind
from engine.planning.cost.cost_fit import CostSample
from engine.planning.cost.cost_model import MicrobatchWork, adapter_load
from engine.runtime.executor import Executor
from engine.runtime.task_state import TaskAssignment
from engine.task import TaskSpec, Training

_FIRST_TOKENS = 16
_LARGEST_SHARE = 0.15  # fraction of the time for one run of the largest probe
_MAX_PASSES = 3
_STRIDE = 8
_RANK = 64  # high, so that the adapters' arithmetic can be measured


@dataclass(frozen=True)
class Probe:
    """A microbatch to time: `num_ranges` tasks, each with `num_sequences` sequences of `num_tokens` tokens.

    The tasks are LoRA of `rank` on one in `module_stride` linear operators, mostly few, so that the cost of tokens can
    be separated from the adapters'. One in `target_stride` positions bears loss. `has_step`: the optimizers step after
    it.
    """

    num_tokens: int
    num_sequences: int = 1
    num_ranges: int = 1
    rank: int = 8
    module_stride: int = _STRIDE
    target_stride: int = 1
    has_step: bool = False


def calibrate(
    executor: Executor, budget_seconds: float, max_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> list[CostSample]:
    """Returns a sample with the median time of each probe.

    Takes about `budget_seconds`, or one pass over the probes.
    """
    started = clock()
    with executor.eagerly(), Bench(executor, clock) as bench:  # each graph would be captured for one replay
        probes = _probes(bench, max_tokens, _LARGEST_SHARE * budget_seconds)
        seconds: dict[Probe, list[float]] = {probe: [] for probe in probes}
        for number, probe in itertools.product(range(_MAX_PASSES), probes):
            if number and clock() - started > budget_seconds:
                break
            seconds[probe].append(bench.seconds(probe))
        return [CostSample(bench.parts(probe), statistics.median(times)) for probe, times in seconds.items()]


def _probes(bench: "Bench", max_tokens: int, largest_seconds: float) -> list[Probe]:
    """Returns probes of four sizes, and variations of the second largest in one field each.

    The largest takes about `largest_seconds`.
    """
    largest = _FIRST_TOKENS
    bench.seconds(Probe(largest))  # the first run is slower than those after it
    while 2 * largest <= max_tokens and bench.seconds(Probe(largest)) < largest_seconds / 2:
        largest *= 2
    base = max(_FIRST_TOKENS, largest // 2)
    return [
        *(Probe(size) for size in sorted({largest, base, base // 2, base // 4})),
        Probe(base, target_stride=16),
        Probe(base, module_stride=1),
        Probe(base, rank=_RANK, module_stride=2),
        Probe(base // 4, num_ranges=4, module_stride=1),
        Probe(base // 8, num_sequences=8, target_stride=4),
        Probe(max(1, base // 32), num_sequences=32, target_stride=4),
        Probe(base, rank=_RANK, module_stride=2, has_step=True),
        Probe(base // 8, num_sequences=2, num_ranges=4, module_stride=1, has_step=True),
    ]


def parts_of(microbatch: Microbatch, executor: Executor) -> tuple[MicrobatchWork, ...]:
    """Returns the microbatch's parts for the cost model: resident tasks' ranges, and the optimizer steps after them."""
    sites, parts = executor.backbone.sites, []
    for range_ in microbatch.ranges:
        lengths = [segment.num_tokens for segment in range_.segments]
        targets = microbatch.targets_T[range_.start : range_.start + range_.num_tokens]
        part = MicrobatchWork(range_.num_tokens, sum(n * n for n in lengths), int((targets != IGNORE).sum()),
                    num_segments=len(lengths))  # fmt: skip
        if (state := executor.tasks.get(range_.task)) is not None:
            load = adapter_load(state.assignment.spec.method, sites)
            part = replace(
                part,
                num_modules=load.num_modules,
                num_multiplications=load.num_multiplications * range_.num_tokens,
                num_stepped_parameters=load.num_parameters if range_.is_last else 0,
            )
        parts.append(part)
    return tuple(parts)


class Bench:
    """Runs probes with temporary tasks, which are attached once and detached at the end."""

    def __init__(self, executor: Executor, clock: Callable[[], float]) -> None:
        self._executor, self._clock = executor, clock
        self._random = np.random.default_rng(0)
        self._names: list[str] = []

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self._names:
            if name in self._executor.tasks:
                self._executor.detach(name)

    def seconds(self, probe: Probe) -> float:
        microbatch = self._microbatch(probe)
        self._synchronize()
        started = self._clock()
        self._executor.run(microbatch)
        self._synchronize()
        return self._clock() - started

    def parts(self, probe: Probe) -> tuple[MicrobatchWork, ...]:
        return parts_of(self._microbatch(probe), self._executor)

    def _tasks(self, probe: Probe) -> list[str]:
        names = [f"calibration/{probe.rank}/{probe.module_stride}/{i}" for i in range(probe.num_ranges)]
        linear = [site.name for site in self._executor.backbone.sites if site.kind is SiteKind.LINEAR]
        method = Lora(probe.rank, float(probe.rank), tuple(linear[:: probe.module_stride]))
        for name in names:
            if name not in self._executor.tasks:
                spec = TaskSpec("", method, "", Training(0.0, num_steps=1))
                self._executor.attach(TaskAssignment(name, spec, num_steps=1))
                self._names.append(name)
        return names

    def _microbatch(self, probe: Probe) -> Microbatch:
        longest = self._executor.backbone.max_sequence_tokens
        lengths = _cut(probe.num_tokens, longest) * probe.num_sequences
        size, names = sum(lengths), self._tasks(probe)
        vocabulary = self._executor.backbone.config.get_text_config().vocab_size
        ids_T = self._random.integers(0, vocabulary, size * len(names)).astype(np.int32)
        targets_T = np.where(np.arange(len(ids_T)) % probe.target_stride == 0, ids_T, IGNORE).astype(np.int32)
        offsets = [0, *itertools.accumulate(lengths)]
        segments = tuple(Segment(n, at) for n, at in zip(lengths, offsets, strict=False))
        ranges = tuple(Range(name, 0, i * size, size, segments, size, probe.has_step) for i, name in enumerate(names))
        return Microbatch(0, MicrobatchKind.TRAIN, ids_T, targets_T, ranges, False)

    def _synchronize(self) -> None:
        if self._executor.backbone.device.type == "cuda":
            torch.cuda.synchronize()


def _cut(num_tokens: int, longest: int) -> list[int]:
    """Returns the lengths of sequences of at most `longest` tokens."""
    whole, rest = divmod(max(1, num_tokens), longest)
    return [longest] * whole + ([rest] if rest else [])
