"""Creates the tasks that side_by_side.py runs, with lengths, ranks and targets mixed as in the MuxTune paper.

The paper's datasets are SST-2, OpenBookQA and RTE, cut at 64, 128 and 256 tokens. Rows here are random tokens; their
lengths are drawn from log-normal distributions (`CORPORA`) of short to long questions that we chose, not fitted to the
datasets. Every position bears loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.alignment.dataset import TokenizedDataset
from engine.methods import Lora
from engine.planning.cost.chunk_size import SequenceLengths, allowed_padding_tokens, choose_chunk
from engine.task import LrSchedule, TaskSpec, Training

Targets = Sequence[Sequence[str]]  # of tasks in turn
RANKS = (8, 16, 32, 64)
Rows = tuple[NDArray[np.int32], ...]


@dataclass(frozen=True)
class Corpus:
    """A corpus with log-normal lengths in tokens: half of them under `median`; clipped to 4 and `cap`."""

    name: str
    cap: int
    median: float
    sigma: float

    def lengths(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        drawn = random.lognormal(np.log(self.median), self.sigma, count)
        return np.clip(np.rint(drawn), 4, self.cap).astype(np.int64)


CORPORA = {
    "sst2": Corpus("sst2", 64, 22, 0.5),
    "openbookqa": Corpus("openbookqa", 128, 45, 0.4),
    "rte": Corpus("rte", 256, 80, 0.5),
}
MIXES = {name: (name,) for name in CORPORA} | {"mixed": tuple(CORPORA)}


@dataclass(frozen=True)
class Work:
    """One task: its spec and its rows, of which a round reads `spec.training.global_batch_size`."""

    name: str
    corpus: Corpus
    spec: TaskSpec
    rows: Rows

    def batch(self, round_: int) -> Rows:
        size = self.spec.training.global_batch_size
        return self.rows[round_ * size : (round_ + 1) * size]

    def num_tokens(self, round_: int) -> int:
        return sum(map(len, self.batch(round_)))

    @cached_property
    def dataset(self) -> TokenizedDataset:
        lengths = np.array([len(row) for row in self.rows], np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.concatenate(self.rows)
        return TokenizedDataset(ids, np.ones(len(ids), np.bool_), offsets, np.arange(len(lengths)), lengths, (), 0)


@dataclass(frozen=True)
class Workload:
    """Tasks that train together; each takes one optimizer step a round."""

    mix: str
    micro_batch_size: int
    tasks: tuple[Work, ...]

    def num_tokens(self, round_: int) -> int:
        return sum(work.num_tokens(round_) for work in self.tasks)

    def lengths(self, round_: int) -> list[int]:
        return [len(row) for work in self.tasks for row in work.batch(round_)]

    def chunk_tokens(self, token_budget: int) -> int:
        """Return the chunk that the planner chooses without calibrated costs. A micro batch over the budget is cut."""
        sequences = [self._sequences(work, token_budget) for work in self.tasks]
        tokens = sum(task.num_tokens for task in sequences)
        num_microbatches = math.ceil(tokens / token_budget)
        return choose_chunk(sequences, num_microbatches, allowed_padding_tokens(tokens, num_microbatches))

    def _sequences(self, work: Work, token_budget: int) -> SequenceLengths:
        lengths = tuple(map(len, work.rows))
        tokens = sum(lengths) / self.num_rounds
        return SequenceLengths(lengths, self.micro_batch_size, math.ceil(tokens / token_budget), tokens)

    @property
    def num_rounds(self) -> int:
        return len(self.tasks[0].rows) // self.micro_batch_size

    @property
    def label(self) -> str:
        return label(self.mix, len(self.tasks), self.micro_batch_size)


def label(mix: str, num_tasks: int, micro_batch_size: int) -> str:
    sequences = "1 sequence" if micro_batch_size == 1 else f"{micro_batch_size} sequences"
    return f"{mix}, {num_tasks} tasks of {sequences}"


def make(
    mix: str, num_tasks: int, micro_batch_size: int, num_rounds: int, vocabulary: int, targets: Targets
) -> Workload:
    """Make tasks that use the mix's corpora, ranks and targets in turn. Equal arguments give equal work."""
    random = np.random.default_rng(20260601)
    corpora = [CORPORA[name] for name in MIXES[mix]]
    tasks = []
    for i in range(num_tasks):
        corpus, rank, target_modules = corpora[i % len(corpora)], RANKS[i % len(RANKS)], targets[i // 2 % len(targets)]
        lengths = corpus.lengths(random, num_rounds * micro_batch_size)
        rows = tuple(random.integers(0, vocabulary, length).astype(np.int32) for length in lengths)
        tasks.append(
            Work(f"task-{i}", corpus, _spec(corpus, rank, target_modules, num_rounds, micro_batch_size, i), rows)
        )
    return Workload(mix, micro_batch_size, tuple(tasks))


def _spec(
    corpus: Corpus, rank: int, targets: Sequence[str], num_rounds: int, micro_batch_size: int, seed: int
) -> TaskSpec:
    training = Training(
        1e-3, num_steps=num_rounds, lr_schedule=LrSchedule.CONSTANT, micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size, max_sequence_tokens=corpus.cap, shuffle=False, seed=seed,
    )  # fmt: skip
    return TaskSpec("benchmark", Lora(rank, 2.0 * rank, tuple(targets)), "random", training)
