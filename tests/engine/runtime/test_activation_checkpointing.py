"""Activation checkpointing changes what a step saves but not its results: they equal those without it bit for bit."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf

from engine.errors import BackboneUnsupportedError
from engine.methods import Bottleneck, Lora, Prefix, Prompt, Selective, Vera
from engine.runtime import activation_checkpointing
from engine.runtime.backbone import Backbone
from engine.runtime.executor import Executor
from tests.engine.runtime.test_methods import ALL, IN_PEFT, MORE, OWN, tasks_of
from tests.engine.runtime.tiny import CONFIGS, TinyTask, model_of, train

ON_ANY_MODEL = {
    "lora": Lora(4, 8.0, ALL),
    "dropout": Lora(4, 8.0, ALL, 0.3),
    "vera": Vera(8, ALL, 0.2),
    "prompt": Prompt(3),
    "norms": Selective(("all-norms",)),
}


def trained(model: Any, tasks: list[TinyTask], *, checkpoints: bool) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Returns (losses, parameters) of each task after two steps, of which one is verified alone if the task asks for
    it."""
    executor = Executor(Backbone(copy.deepcopy(model), activation_checkpointing=checkpoints))
    for task in tasks:
        executor.attach(task.assignment)
    results = train(executor, tasks, 2)
    losses = {name: [result.loss for result in task_results] for name, task_results in results.items()}
    return losses, {name: run.parameters_P.detach().clone() for name, run in executor.tasks.items()}


def assert_equal(model: Any, tasks: list[TinyTask]) -> None:
    (losses, parameters), (again, recomputed) = (trained(model, tasks, checkpoints=on) for on in (False, True))
    assert losses == again and all(len(task_losses) == 2 for task_losses in losses.values())
    for name, parameters_P in parameters.items():
        assert torch.equal(parameters_P, recomputed[name]), name


def test_all_methods_in_one_batch_train_bit_for_bit_the_same() -> None:
    methods = IN_PEFT | OWN | MORE
    assert_equal(model_of(CONFIGS["llama-tied"]), tasks_of(methods, 2, verify_every_steps=2))


@pytest.mark.parametrize("name", CONFIGS)
def test_on_every_architecture(name: str) -> None:
    methods = ON_ANY_MODEL | ({} if name.endswith("window") or name.startswith("gemma") else {"prefix": Prefix(4)})
    methods = {n: m for n, m in methods.items() if not (n == "prompt" and name == "opt-projected")}
    assert_equal(model_of(CONFIGS[name]), tasks_of(methods, 2))


def test_each_method_alone() -> None:
    """A layer's input needs no gradient if no task trains anything below the layer."""
    model = model_of(CONFIGS["llama"])
    for name, method in {"last": Lora(4, 8.0, ("1.mlp.down_proj",), 0.2), "block": Bottleneck(4, ("1.mlp",))}.items():
        assert_equal(model, tasks_of({name: method}, 2))


@pytest.mark.parametrize("checkpoints", [False, True])
def test_each_layer_runs_twice_only_with_checkpointing(checkpoints: bool) -> None:
    backbone = Backbone(model_of(CONFIGS["llama"]), activation_checkpointing=checkpoints)
    calls = []
    for layer in backbone.model.model.layers:  # a sublayer of each layer: its hooks run again
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    executor, tasks = Executor(backbone), tasks_of({"lora": Lora(4, 8.0, ALL)}, 2)
    executor.attach(tasks[0].assignment)
    train(executor, tasks, 1)
    num_microbatches = 2
    assert len(calls) == (2 if checkpoints else 1) * len(backbone.model.model.layers) * num_microbatches


def test_a_model_without_such_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpointing, "GradientCheckpointingLayer", hf.Cache)
    Backbone(model_of(CONFIGS["llama"]))
    with pytest.raises(BackboneUnsupportedError, match="no layers to checkpoint"):
        Backbone(model_of(CONFIGS["llama"]), activation_checkpointing=True)
