"""Tasks trained together in the engine equal each trained alone with HF PEFT: losses, norms, exported weights."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.runtime.backbone import Backbone
from engine.runtime.executor import Executor
from engine.task import LrSchedule, Optimizer
from tests.engine.runtime.tiny import CONFIGS, TinyTask, executor_with, model_of, task_of, train, train_with_peft


def assert_parity(model: object, tasks: Sequence[TinyTask], tmp_path: Path) -> None:
    executor = executor_with(model, tasks)
    for task in tasks:
        executor.export(task.name, tmp_path / task.name / "before")
    results = train(executor, tasks, max(t.num_steps for t in tasks))
    for task in tasks:
        losses, norms, tensors = train_with_peft(model, task, tmp_path / task.name / "before")
        assert [r.loss for r in results[task.name]] == pytest.approx(losses, rel=1e-5), task.name
        assert [r.grad_norm for r in results[task.name]] == pytest.approx(norms, rel=1e-3), task.name
        executor.export(task.name, tmp_path / task.name / "after")
        exported = load_file(tmp_path / task.name / "after" / "adapter_model.safetensors")
        assert exported.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(exported[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        before = load_file(tmp_path / task.name / "before" / "adapter_model.safetensors")
        assert any((before[n] - exported[n]).abs().max() > 1e-3 for n in before), "it did not train"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_equals_peft(architecture: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[architecture])
    names = {n.rpartition(".")[2] for n in Backbone(copy.deepcopy(model)).operators}
    some = sorted(names)[:2]
    tasks = [
        task_of("a", seed=1, rank=4, lengths=(7, 12, 3, 9), num_steps=2),
        task_of("b", seed=2, rank=3, targets=some, lengths=(15, 2, 10, 10, 4), num_steps=3, global_batch_size=3),
    ]
    assert_parity(model, tasks, tmp_path)


@pytest.mark.parametrize(
    "training",
    [
        dict(lr_schedule=LrSchedule.COSINE, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.05),
        dict(lr_schedule=LrSchedule.LINEAR, beta1=0.8, beta2=0.95, epsilon=1e-6, max_grad_norm=0.0),
        dict(optimizer=Optimizer.SGD, momentum=0.9, weight_decay=0.01, learning_rate=0.1, max_grad_norm=0.5),
        dict(optimizer=Optimizer.SGD, learning_rate=0.1, warmup_steps=1),
    ],
    ids=["cosine-warmup-decay-clip", "linear-betas-unclipped", "sgd-momentum-decay-clip", "sgd-plain"],
)
def test_every_optimizer_option_equals_peft(training: dict[str, object], tmp_path: Path) -> None:
    tasks = [
        task_of("a", seed=1, rank=8, lengths=(7, 12, 3, 9, 20, 5), num_steps=6, micro_batch_size=1, **training),
        task_of("b", seed=2, rank=2, targets=["q_proj", "v_proj"], lengths=(15, 2), num_steps=4, **training),
        task_of("c", seed=3, rank=5, targets=["down_proj"], lengths=(31, 8, 9), num_steps=5, global_batch_size=2),
    ]
    assert_parity(model_of(CONFIGS["llama"]), tasks, tmp_path)


def test_a_task_does_not_depend_on_its_neighbours_with_dropout_on() -> None:
    model = model_of(CONFIGS["llama"])
    task = task_of("a", seed=7, rank=4, dropout=0.3, num_steps=4)
    near = [task_of("b", seed=1, rank=8, dropout=0.1, num_steps=4, lengths=(40, 30)), task]
    far = [task, task_of("c", seed=2, targets=["o_proj"], num_steps=2), task_of("d", seed=3, lengths=(9,), num_steps=4)]
    alone, *others = [executor_with(model, tasks) for tasks in ([task], near, far)]
    expected = train(alone, [task], 4)["a"]
    for executor, tasks in zip(others, (near, far), strict=True):
        results = train(executor, tasks, 4)["a"]
        assert [r.loss for r in results] == pytest.approx([r.loss for r in expected], rel=1e-5)
        difference = executor.tasks["a"].parameters_P - alone.tasks["a"].parameters_P
        assert difference.abs().max() < 1e-5


def test_dropout_does_not_depend_on_how_a_batch_is_cut() -> None:
    model = model_of(CONFIGS["llama"])
    whole = task_of("a", seed=7, dropout=0.3, micro_batch_size=4)
    cut = task_of("a", seed=7, dropout=0.3, micro_batch_size=1)
    losses = [[r.loss for r in train(executor_with(model, [t]), [t], 3)["a"]] for t in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    dry = task_of("a", seed=7, dropout=0.0)
    assert losses[0] != pytest.approx([r.loss for r in train(executor_with(model, [dry]), [dry], 3)["a"]], rel=1e-4)


def test_an_exported_adapter_works_as_an_initial_adapter(tmp_path: Path) -> None:
    model = model_of(CONFIGS["gpt2"])
    first = task_of("first", seed=1)
    executor = executor_with(model, [first])
    train(executor, [first], 3)
    executor.export("first", tmp_path)
    second = task_of("second", seed=9)
    follower = Executor(Backbone(copy.deepcopy(model)))
    follower.attach(second.assignment, None, tmp_path)
    tensors = follower.tasks["second"].tensors
    for name, tensor in executor.tasks["first"].tensors.items():
        assert torch.equal(tensors[name], tensor)
    losses, _, _ = train_with_peft(model, second, tmp_path)
    assert [r.loss for r in train(follower, [second], 3)["second"]] == pytest.approx(losses, rel=1e-5)
