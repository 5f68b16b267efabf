"""Each field of Training declares its effects correctly: cache keys are made of these declarations.

A missing declaration would give stale tokens, a stale estimate or wrong bytes. The tests change every field and compare
all results that it does not declare to affect.
"""

import dataclasses
import enum
import json
from typing import Any

import numpy as np
import pytest

from engine.alignment.dataset import TokenizedDataset, num_steps, split, tokenize_dataset
from engine.alignment.jsonl_rows import parse_lines
from engine.alignment.packing import PackedTask, rounds
from engine.alignment.preflight import preflight
from engine.alignment.tokenizer import BackboneTokenizer
from engine.methods import Lora
from engine.planning.cost.memory_model import footprint
from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.types import BackboneView, PlannerConfig, Site, TaskView
from engine.task import (
    Affects,
    Optimizer,
    TaskSpec,
    Training,
    fields_affecting,
    out_of_bounds,
    slice_error,
    values_affecting,
)
from muxtune.v1 import task_pb2
from services.admission.policy import task_estimator
from services.conversion.task import training_to_domain, training_to_proto

FIELDS = {field.name: field for field in dataclasses.fields(Training)}
SITES = tuple(Site(f"layers.{i}.q_proj", 64, 64) for i in range(2))
BACKBONE = BackboneView("b", 10**6, 2, 64, 100, 512, 4 << 20, "float32", SITES)
BASES = (
    Training(1e-3, num_steps=7, micro_batch_size=2, global_batch_size=4, heldout_fraction=0.2, evaluate_every_steps=2),
    Training(
        1e-3, num_epochs=2, optimizer=Optimizer.SGD, global_batch_size=4, heldout_fraction=0.2, max_sequence_tokens=20
    ),
)
ROWS = [{"text": "abc <|im_end|> " * (1 + 7 * (i % 3)) + str(i)} for i in range(12)]
# Values that differ from BASES and from the defaults. A new field needs one here, and nothing else in this file.
OTHER: dict[str, Any] = {
    "learning_rate": 3e-4, "num_steps": 9, "num_epochs": 3, "warmup_steps": 3, "micro_batch_size": 3,
    "global_batch_size": 5, "max_sequence_tokens": 9, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.99,
    "epsilon": 1e-6, "momentum": 0.9, "max_grad_norm": 0.5, "seed": 11, "heldout_fraction": 0.5,
    "evaluate_every_steps": 3, "early_stop_patience": 2, "early_stop_min_delta": 0.1, "verify_every_steps": 2,
}  # fmt: skip


def changed(base: Training, name: str) -> Training | None:
    """Return `base` with another value of one field, or None where `base` does not use the field."""
    value = getattr(base, name)
    if name in ("num_steps", "num_epochs") and value is None:
        return None
    if isinstance(value, enum.Enum):
        other: Any = next(choice for choice in type(value) if choice is not value)
    else:
        other = (not value) if isinstance(value, bool) else OTHER[name]
    assert other != value
    return dataclasses.replace(base, **{name: other})


def cases(affects: Affects) -> list[Any]:
    """Return (base, changed) for each field that does not declare any of these effects."""
    declared = fields_affecting(affects)
    return [
        pytest.param(base, other, id=f"{name}-{number}")
        for name in FIELDS
        for number, base in enumerate(BASES)
        if name not in declared and (other := changed(base, name)) is not None
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_declares_its_effects_and_bounds(name: str) -> None:
    metadata = FIELDS[name].metadata
    assert metadata["affects"] and callable(metadata["bound"].holds)
    for base in BASES:
        other = changed(base, name)
        assert other is None or not list(out_of_bounds(other))
        assert other is None or training_to_domain(training_to_proto(other)) == other


def tokens(tokenizer: BackboneTokenizer, training: Training) -> TokenizedDataset:
    return tokenize_dataset(parse_lines(json.dumps(row).encode() for row in ROWS), tokenizer, training)


def same(a: TokenizedDataset, b: TokenizedDataset) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


@pytest.mark.parametrize(("base", "other"), cases(Affects.TOKENS))
def test_fields_without_an_effect_on_tokens_do_not_change_them(
    tokenizer: BackboneTokenizer, base: Training, other: Training
) -> None:
    assert same(tokens(tokenizer, base), tokens(tokenizer, other))
    assert values_affecting(base, Affects.TOKENS) == values_affecting(other, Affects.TOKENS)


def microbatches(dataset: TokenizedDataset, training: Training) -> list[Any]:
    steps = num_steps(training, len(split(dataset.num_rows, training).train))
    task = PackedTask("tenants/a/tasks/t", dataset, training, steps, 0)
    return [(m.kind, m.token_ids_T.tolist(), m.targets_T.tolist(), m.ranges) for m in rounds([task], 64, 8)]


@pytest.mark.parametrize(("base", "other"), cases(Affects.TOKENS | Affects.DATA))
def test_fields_without_an_effect_on_data_do_not_change_batches_and_preflight(
    tokenizer: BackboneTokenizer, base: Training, other: Training
) -> None:
    dataset = tokens(tokenizer, base)
    assert microbatches(dataset, base) == microbatches(dataset, other)
    assert preflight(dataset, tokenizer, base, 3) == preflight(dataset, tokenizer, other, 3)


@pytest.mark.parametrize(("base", "other"), cases(Affects.MEMORY))
def test_fields_without_an_effect_on_memory_do_not_change_bytes(base: Training, other: Training) -> None:
    a, b = (footprint(spec(training), BACKBONE) for training in (base, other))
    assert a == b


@pytest.mark.parametrize(("base", "other"), cases(Affects.DATA | Affects.COST | Affects.MEMORY))
def test_fields_without_an_effect_on_cost_do_not_change_the_demand(base: Training, other: Training) -> None:
    a, b = (demand(training) for training in (base, other))
    assert dataclasses.replace(a, task=b.task) == b


def test_declared_effects_are_visible_in_these_rows_and_models(tokenizer: BackboneTokenizer) -> None:
    """Each declared effect on tokens and bytes is visible here, so that the tests above find an undeclared one."""
    for name in fields_affecting(Affects.TOKENS):
        others = [(base, other) for base in BASES if (other := changed(base, name)) is not None]
        assert any(not same(tokens(tokenizer, base), tokens(tokenizer, other)) for base, other in others), name
    for name in fields_affecting(Affects.MEMORY):
        others = [(base, other) for base in BASES if (other := changed(base, name)) is not None]
        assert any(footprint(spec(a), BACKBONE) != footprint(spec(b), BACKBONE) for a, b in others), name


def test_only_fields_of_the_optimizer_alone_keep_a_cached_estimate() -> None:
    for name in FIELDS:
        for base in BASES:
            other = changed(base, name)
            if other is not None:
                relevant = [task_estimator._without_irrelevant_fields(proto(training)) for training in (base, other)]
                assert (relevant[0] == relevant[1]) == (FIELDS[name].metadata["affects"] == Affects.OPTIMIZER), name


def spec(training: Training) -> TaskSpec:
    return TaskSpec("b", Lora(8, 8.0, ("q_proj",)), "d", training)


def proto(training: Training) -> Any:
    return task_pb2.TaskSpec(training=training_to_proto(training))


def demand(training: Training) -> Any:
    steps = training.num_steps or 6
    task = TaskView("t", "tenants/a", spec(training), 0, steps, num_train_tokens=1000)
    return DemandEstimator(PlannerConfig()).estimate(task, BACKBONE)


def test_a_slice_has_at_most_as_many_tokens_as_one_message_carries() -> None:
    fits = Training(1e-3, num_steps=1, micro_batch_size=1024, max_sequence_tokens=1024)
    assert slice_error(fits) is None
    error = slice_error(fits, num_virtual_tokens=1)
    assert error is not None and error.field == "micro_batch_size" and "at most 1048576" in error.remedy
