"""Every method, trained in one batch with all others, equals its reference, which trains it alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import InvalidInputError
from engine.methods import (
    Activation,
    Bottleneck,
    BottleneckPlacement,
    Ia3,
    Lora,
    LoraBias,
    LoraInit,
    Miss,
    Prefix,
    Prompt,
    Selective,
    Vera,
)
from engine.methods.base import Method, SiteKind
from engine.planning.cost.memory_model import adapter_bytes
from engine.planning.types import BackboneView
from engine.task import LrSchedule, Optimizer
from tests.engine.runtime.tiny import CONFIGS, VOCAB, TinyTask, executor_with, model_of, task_of, train, train_with_peft

ALL = ("all-linear",)
IN_PEFT: dict[str, Method] = {
    "lora": Lora(4, 8.0, ALL),
    "rslora": Lora(8, 4.0, ("q_proj", "down_proj"), use_rslora=True),
    "patterns": Lora(4, 8.0, ALL, rank_pattern={"q_proj": 7, "1.mlp.up_proj": 1}, alpha_pattern={"v_proj": 3.0}),
    "loraplus": Lora(4, 8.0, ("v_proj", "up_proj"), b_rate_factor=8.0),
    "lora-bias-all": Lora(2, 4.0, ("k_proj", "down_proj"), bias=LoraBias.ALL),
    "lora-bias-own": Lora(2, 4.0, ("q_proj", "o_proj"), bias=LoraBias.LORA_ONLY),
    "dora": Lora(4, 8.0, ("q_proj", "down_proj"), use_dora=True),
    "dora-rslora": Lora(64, 8.0, ("gate_proj", "o_proj"), use_dora=True, use_rslora=True),
    "vera": Vera(16, ALL, projection_prng_key=7),
    "ia3": Ia3(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "ia3-outputs": Ia3(("o_proj", "up_proj")),
    "norms": Selective(("all-norms",)),
    "some-norms": Selective(("1.input_layernorm.weight", "model.norm.weight")),
    "miss": Miss(7, ALL),
    "prompt": Prompt(5),
    "long-prompt": Prompt(17),
    "prefix": Prefix(6),
}
OWN: dict[str, Method] = {
    "houlsby": Bottleneck(8, ("self_attn", "mlp"), scale=0.5),
    "pfeiffer": Bottleneck(5, ("1.mlp",), activation=Activation.SILU),
    "he-parallel": Bottleneck(4, ("mlp",), BottleneckPlacement.PARALLEL, Activation.TANH, scale=4.0),
    "serial-linear": Bottleneck(8, ("o_proj", "down_proj")),
    "parallel-linear": Bottleneck(3, ("gate_proj",), BottleneckPlacement.PARALLEL, Activation.GELU),
    "nested": Bottleneck(2, ("mlp", "down_proj")),
    "bitfit": Selective(("all-biases",)),
    "mixed-vectors": Selective(("q_proj.bias", "post_attention_layernorm.weight")),
}
MORE: dict[str, Method] = {  # without a reference: masks differ, or the parametrisation
    "pissa": Lora(3, 8.0, ("q_proj", "up_proj"), init=LoraInit.PISSA),
    "olora": Lora(5, 4.0, ("v_proj", "down_proj"), init=LoraInit.OLORA),
    "lora-dropout": Lora(4, 8.0, ALL, 0.3),
    "dora-dropout": Lora(4, 8.0, ("q_proj", "down_proj"), 0.2, use_dora=True),
    "vera-dropout": Vera(8, ALL, 0.4),
    "miss-dropout": Miss(4, ALL, 0.1),
    "rank-1": Lora(1, 1.0, ALL),
    "rank-over-width": Lora(100, 8.0, ("q_proj",)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    f"{optimizer.value}-{accumulation}-{schedule.value}": dict(
        optimizer=optimizer,
        learning_rate=1e-3 if optimizer is Optimizer.ADAMW else 1e-2,
        weight_decay=0.1 if accumulation == 1 else 0.0,
        momentum=0.5 if optimizer is Optimizer.SGD and accumulation == 4 else 0.0,
        micro_batch_size=4 // accumulation,
        lr_schedule=schedule,
        warmup_steps=5 if schedule is LrSchedule.COSINE else 0,
    )
    for optimizer in Optimizer
    for accumulation in (1, 4)
    for schedule in (LrSchedule.CONSTANT, LrSchedule.COSINE)
}


def tasks_of(methods: dict[str, Method], num_steps: int, **training: object) -> list[TinyTask]:
    lengths = ((7, 12, 3, 9), (31, 2, 10, 10, 4), (5, 5, 5), (64, 6, 2, 18), (17, 8))
    return [
        task_of(name, seed=i, method=method, lengths=lengths[i % 5], num_steps=num_steps, **training)
        for i, (name, method) in enumerate(methods.items())
    ]


# Any two of the options meet in one of these; fewer steps show what differs from the first on.
COVERING = ("adamw-4-cosine", "sgd-1-constant")  # each value of each option


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        *(pytest.param(OPTIONS[name], 15, id=name) for name in COVERING),
        *(pytest.param(OPTIONS[name], 50, id=f"{name}-long", marks=pytest.mark.thorough) for name in OPTIONS),
    ],
)
def test_every_method_among_all_others_equals_its_reference_alone(
    options: dict[str, Any], num_steps: int, tmp_path: Path
) -> None:
    """Compares losses to 1e-5 and weights to 1e-4 with HF PEFT, or plain torch for methods it does not have.

    The rates are low enough for float32: at ten times these, PEFT in float32 and in float64 differ by 1e-4.
    """
    model = model_of(CONFIGS["llama-tied"])  # with biases
    is_adam = options["optimizer"] is Optimizer.ADAMW
    tasks = tasks_of({n: m for n, m in (IN_PEFT | OWN).items() if n != "loraplus" or is_adam}, num_steps, **options)
    executor = executor_with(model, tasks)
    for task in tasks:
        executor.export(task.name, tmp_path / task.name / "before")
    results = train(executor, tasks, num_steps)
    for task in tasks:
        losses, _, tensors = train_with_peft(model, task, tmp_path / task.name / "before")
        assert [r.loss for r in results[task.name]] == pytest.approx(losses, rel=1e-5), task.name
        executor.export(task.name, tmp_path / task.name / "after")
        before, after = (
            load_file(tmp_path / task.name / when / "adapter_model.safetensors") for when in ("before", "after")
        )
        assert after.keys() == tensors.keys(), task.name
        for name, tensor in tensors.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert any((before[name] - after[name]).abs().max() > 1e-4 for name in after), "it did not train"


EVERYWHERE: dict[str, Method] = {
    "lora": Lora(3, 6.0, ALL, rank_pattern={}, use_rslora=True),
    "dora": Lora(2, 6.0, ALL, use_dora=True),
    "pissa": Lora(2, 6.0, ALL, init=LoraInit.PISSA),
    "olora": Lora(2, 6.0, ALL, init=LoraInit.OLORA),
    "vera": Vera(8, ALL),
    "ia3": Ia3(ALL),
    "ia3-inputs": Ia3(ALL, ALL),
    "miss": Miss(5, ALL),
    "bottleneck": Bottleneck(4, ALL),
    "norms": Selective(("all-norms",)),
    "bitfit": Selective(("all-biases",)),
    "biases": Lora(2, 2.0, ALL, bias=LoraBias.ALL),
    "prompt": Prompt(3),
    "prefix": Prefix(3),
}
NOT_THERE = {
    "prompt": {"opt-projected"},
    "miss": {"gpt2"},
    "prefix": {"mistral-window", "gemma2", "gemma3"},
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_method_trains_and_exports_on_every_architecture_or_is_refused(architecture: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[architecture])
    executor = executor_with(model, [])
    has_bias = any(site.has_bias for site in executor.backbone.sites)
    blocks = [site.name for site in executor.backbone.sites if site.kind is SiteKind.BLOCK]
    tasks = []
    for task in tasks_of(EVERYWHERE | {"sublayers": Bottleneck(4, tuple(blocks))}, 2, learning_rate=0.03):
        lacks_bias = task.name in ("bitfit", "biases") and not has_bias
        if lacks_bias or architecture in NOT_THERE.get(task.name, ()):
            with pytest.raises(InvalidInputError, match=r"spec\.\w+\.(length|bias|parameters|target_modules)"):
                executor.attach(task.assignment)
        else:
            executor.attach(task.assignment)
            tasks.append(task)
    train(executor, tasks, 2)
    for task in tasks:
        report = executor.export(task.name, tmp_path / task.name)
        assert report.max_logit_difference < 1e-4, task.name


@pytest.mark.parametrize(
    "optimizer", [dict(), dict(optimizer=Optimizer.SGD), dict(optimizer=Optimizer.SGD, momentum=0.9)]
)
def test_a_task_holds_the_bytes_that_the_memory_model_predicts(optimizer: dict[str, Any]) -> None:
    tasks = tasks_of(IN_PEFT | OWN | MORE, 2, **optimizer)
    executor = executor_with(model_of(CONFIGS["llama-tied"]), tasks)
    train(executor, tasks, 1)
    backbone = BackboneView("tiny", 0, 2, 32, VOCAB, 128, 0, "float32", executor.backbone.sites)
    num_bytes = executor.task_bytes()
    for task in tasks:
        assert num_bytes[task.name] == adapter_bytes(task.spec, backbone), task.name
