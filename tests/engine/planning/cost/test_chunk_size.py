"""Tests the chunk: expected tails against counted ones, and padding of mixed tasks packed by alignment itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.alignment.dataset import TokenizedDataset
from engine.alignment.packing import PackedTask, rounds
from engine.methods import Lora
from engine.planning.cost.chunk_size import CHUNK_SIZES, SequenceLengths, allowed_padding_tokens, choose_chunk
from engine.planning.planner import plan
from engine.planning.types import (
    BackboneView,
    CostProfile,
    ExecutorView,
    HTask,
    PlannerConfig,
    Site,
    Snapshot,
    TaskView,
)
from engine.task import TaskSpec, Training
from tests.thoroughness import examples

SITES = tuple(Site(f"layers.{i}.q_proj", 64, 64) for i in range(4))
BACKBONE = BackboneView("b", 10**6, 4, 64, 1000, 512, 4 << 20, "float32", SITES)
COST = CostProfile(fixed_seconds=0.02, token_seconds=1e-3)
# Lengths as of the paper's datasets, drawn log-normally: median tokens, spread of the logarithm, cap.
SHAPES = {"sst2": (22, 0.5, 64), "openbookqa": (45, 0.4, 128), "rte": (80, 0.5, 256)}
MIXES = {
    "sst2": ("sst2",) * 4,
    "openbookqa": ("openbookqa",) * 4,
    "rte": ("rte",) * 4,
    "all three": ("sst2", "openbookqa", "rte") * 2,
    "many": ("sst2", "openbookqa", "rte") * 5,
}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(1, 4), st.sampled_from(CHUNK_SIZES))
@settings(max_examples=examples(60), deadline=None)
def test_expected_tails_are_the_mean_over_all_draws(lengths: list[int], count: int, chunk: int) -> None:
    """Compares with all draws of so many sequences if they are few; else with 20,000 of them."""
    if len(lengths) ** count <= 20_000:
        draws = np.stack(np.meshgrid(*[lengths] * count), -1).reshape(-1, count)
        tolerance = 1e-9
    else:
        draws, tolerance = np.random.default_rng(0).choice(lengths, (20_000, count)), 0.04
    expected = float((-draws.sum(axis=1) % chunk).mean())
    task = SequenceLengths(tuple(lengths), count, 1, float(np.mean(lengths)) * count)
    assert task.padding_tokens(1, chunk) == pytest.approx(expected, abs=tolerance * chunk + 1e-9)


def test_sequences_that_fill_their_chunks_get_the_largest() -> None:
    full, half = SequenceLengths((64,), 8, 2, 512.0), SequenceLengths((96,), 7, 2, 672.0)
    assert choose_chunk([full], 1, allowed_padding_tokens(512, 1)) == 64
    assert full.padding_tokens(1, 64) == 0
    assert half.padding_tokens(1, 64) == 32  # 672 is ten and a half chunks
    assert choose_chunk([half], 1, allowed_padding_tokens(672, 1)) == 32
    assert choose_chunk([SequenceLengths((), 8, 2, 300.0)], 1, 0.0) == 1


def test_padding_under_the_knee_is_free_and_past_it_costs_its_price() -> None:
    dear, idle = CostProfile(token_seconds=1.0), CostProfile(token_seconds=1.0, knee_tokens=1000.0)
    assert allowed_padding_tokens(400, 1, 500.0, dear) == pytest.approx(0.01 * 500)
    assert allowed_padding_tokens(400, 1, 1000.0, idle) == pytest.approx(0.025 * 400)
    heads = CostProfile(token_seconds=0.1)  # tokens are a small part of a round of 500 s
    assert allowed_padding_tokens(400, 1, 500.0, heads) == pytest.approx(0.025 * 400)


def dataset(shape: str, random: np.random.Generator) -> TokenizedDataset:
    median, spread, cap = SHAPES[shape]
    lengths = np.clip(np.exp(random.normal(np.log(median), spread, 400)).astype(np.int64), 4, cap)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.zeros(offsets[-1], np.int32)
    return TokenizedDataset(ids, np.ones(len(ids), np.bool_), offsets, np.arange(400), lengths, (), 0)


def planned(
    mix: tuple[str, ...], global_batch: int, limits: PlannerConfig
) -> tuple[list[PackedTask], tuple[HTask, ...], float]:
    """Return the tasks' data, their plan on one executor, and the padding that it predicts."""
    random, members, tasks = np.random.default_rng(len(mix)), [], []
    for i, shape in enumerate(mix):
        data = dataset(shape, random)
        training = Training(1e-3, num_steps=12, micro_batch_size=8, global_batch_size=global_batch,
                            max_sequence_tokens=SHAPES[shape][2], seed=i)  # fmt: skip
        members.append(PackedTask(f"t/tasks/{i}", data, training, 12, 0))
        quantiles = np.quantile(np.diff(data.offsets), (np.arange(64) + 0.5) / 64, method="inverted_cdf")
        spec = TaskSpec("b", Lora(8, 8.0, ("q_proj",)), "", training)
        tokens = int(12 * global_batch * np.diff(data.offsets).mean())
        tasks.append(TaskView(members[-1].task, "t", spec, i, 12, num_train_tokens=tokens,
                              length_quantiles=tuple(quantiles.astype(int).tolist())))  # fmt: skip
    result = plan(Snapshot(tuple(tasks), (ExecutorView("e", BACKBONE, 1 << 40, cost=COST),)), limits)
    parts = [(e.predicted_padding_fraction or 0.0, task.num_train_tokens)
             for e, task in zip(result.explanations, tasks, strict=True)]  # fmt: skip
    padding = sum(fraction / (1 - fraction) * tokens for fraction, tokens in parts)
    return members, result.htasks["e"], padding / (padding + sum(tokens for _, tokens in parts))


def padding(members: list[PackedTask], htasks: tuple[HTask, ...]) -> float:
    """Return the share of padding in all tokens that alignment packs."""
    by_name, whole, effective = {member.task: member for member in members}, 0, 0
    for htask in htasks:
        for microbatch in rounds([by_name[name] for name in htask.tasks], htask.token_budget, htask.chunk_tokens):
            whole += sum(range_.num_tokens for range_ in microbatch.ranges)
            effective += sum(range_.num_effective_tokens for range_ in microbatch.ranges)
    return 1 - effective / whole


@pytest.mark.parametrize("global_batch", [8, 32])
@pytest.mark.parametrize("mix", MIXES)
def test_mixes_as_the_papers_are_padded_by_under_three_percent(mix: str, global_batch: int) -> None:
    members, htasks, predicted = planned(MIXES[mix], global_batch, PlannerConfig(2048))
    assert {htask.chunk_tokens for htask in htasks} <= set(CHUNK_SIZES)
    counted = padding(members, htasks)
    assert 0 < counted < 0.03
    assert predicted == pytest.approx(counted, rel=0.4, abs=0.002)


def test_a_configured_chunk_is_used_and_one_means_no_alignment() -> None:
    members, htasks, _ = planned(MIXES["all three"], 8, PlannerConfig(2048, chunk_tokens=64))
    assert {htask.chunk_tokens for htask in htasks} == {64}
    assert padding(members, htasks) > 0.05
    members, htasks, predicted = planned(MIXES["all three"], 8, PlannerConfig(2048, chunk_tokens=1))
    assert padding(members, htasks) == predicted == 0


def test_larger_batches_take_larger_chunks() -> None:
    chunks = [planned(MIXES["rte"], batch, PlannerConfig(8192))[1][0].chunk_tokens for batch in (2, 8, 32)]
    assert chunks == sorted(chunks) and chunks[0] < chunks[-1]
