"""A task resumed from its checkpoint continues bit for bit; a checkpoint that does not fit is refused."""

from typing import Any

import pytest
import torch

from engine.errors import ArtifactCorruptError
from engine.runtime.checkpoint import STATE_FILE, CheckpointState
from engine.task import LrSchedule, Optimizer
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, pack_round, task_of, train

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": dict(weight_decay=0.1, lr_schedule=LrSchedule.COSINE, warmup_steps=1),
    "sgd": dict(optimizer=Optimizer.SGD),
    "momentum": dict(optimizer=Optimizer.SGD, momentum=0.9),
}


def through_bytes(state: CheckpointState) -> CheckpointState:
    files = state.files()
    assert all(isinstance(data, bytes) for data in files.values())
    return CheckpointState.from_files(files, state.metadata)


@pytest.mark.parametrize("training", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 2])
def test_resume_is_exact(training: dict[str, Any], at: int) -> None:
    model = model_of(CONFIGS["llama"])
    task = task_of("a", num_steps=5, dropout=0.2, **training)
    first = executor_with(model, [task])
    train(first, [task], at)
    state = through_bytes(first.checkpoint("a"))
    assert state.step == at
    expected = train(first, [task], 5)["a"]

    second = executor_with(model, [])
    second.attach(task.assignment, state)
    resumed = train(second, [task], 5)["a"]
    assert [(r.step, r.loss, r.learning_rate, r.grad_norm) for r in resumed] == [
        (r.step, r.loss, r.learning_rate, r.grad_norm) for r in expected
    ]
    assert torch.equal(second.tasks["a"].parameters_P, first.tasks["a"].parameters_P)


def test_a_checkpoint_is_a_copy() -> None:
    task = task_of("a")
    executor = executor_with(model_of(CONFIGS["llama"]), [task])
    train(executor, [task], 1)
    state = executor.checkpoint("a")
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    train(executor, [task], 1)
    assert all(torch.equal(state.tensors[name], before[name]) for name in before)
    fresh = executor_with(model_of(CONFIGS["llama"]), [])
    fresh.attach(task.assignment, state)
    train(fresh, [task], 1)
    assert all(torch.equal(state.tensors[name], before[name]) for name in before)


def test_resuming_within_a_step_restarts_that_step() -> None:
    model = model_of(CONFIGS["llama"])
    task = task_of("a")
    executor = executor_with(model, [task])
    executor.run(pack_round([task], [0])[0])
    executor.tasks["a"].restart_step()
    expected = train(executor_with(model, [task]), [task], 1)["a"][0]
    result = train(executor, [task], 1)["a"][0]
    assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm)


def test_a_checkpoint_that_is_unreadable_or_does_not_fit_is_refused() -> None:
    model = model_of(CONFIGS["llama"])
    task = task_of("a", rank=4)
    executor = executor_with(model, [task])
    train(executor, [task], 1)
    state = executor.checkpoint("a")
    data = state.files()[STATE_FILE]
    for files, metadata in (
        ({}, {"step": 1}),
        ({STATE_FILE: data[:100]}, {"step": 1}),
        ({STATE_FILE: b""}, {"step": 1}),
        ({STATE_FILE: data}, {}),
        ({STATE_FILE: data}, {"step": "x"}),
    ):
        with pytest.raises(ArtifactCorruptError):
            CheckpointState.from_files(files, metadata)
    cases = {
        "rank": (task_of("a", rank=5), state),
        "targets": (task_of("a", targets=["q_proj"]), state),
        "optimizer kind": (task_of("a", optimizer=Optimizer.SGD, momentum=0.9), state),
        "optimizer part": (task, _without(state, "optimizer.0.exp_avg_sq")),
        "optimizer shape": (task, _with(state, "optimizer.0.exp_avg", torch.zeros(3))),
        "no such tensor": (task, _with(state, "parameters.model.x.lora_A", torch.zeros(3))),
    }
    for name, (other, corrupt) in cases.items():
        fresh = executor_with(model, [])
        with pytest.raises(ArtifactCorruptError):
            fresh.attach(other.assignment, corrupt)
        assert not fresh.tasks, name
        assert all(not operator.adapters for operator in fresh.backbone.operators.values()), name


def _without(state: CheckpointState, name: str) -> CheckpointState:
    return CheckpointState({n: t for n, t in state.tensors.items() if n != name}, state.metadata)


def _with(state: CheckpointState, name: str, tensor: torch.Tensor) -> CheckpointState:
    return CheckpointState({**state.tensors, name: tensor}, state.metadata)
