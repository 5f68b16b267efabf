"""Runs a whole step on this CPU as on a GPU: every kernel's source, called as the executor calls it, against torch."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.kernels import cupy_launcher
from engine.methods import Activation, Bottleneck, BottleneckPlacement, Ia3, Lora, LoraBias, Miss, Selective, Vera
from engine.methods.base import Method
from engine.results import StepResult
from engine.runtime.executor import Executor
from tests.engine.kernels.conftest import MakeHost, host_launcher
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, pack_round, task_of

__all__ = ["host_launcher"]

ALL = ("all-linear",)
METHODS: dict[str, Method] = {
    "lora": Lora(3, 8.0, ALL, 0.3, bias=LoraBias.ALL),
    "dora": Lora(2, 3.0, ("q_proj", "down_proj"), use_dora=True),
    "dora-dropout": Lora(2, 3.0, ("q_proj", "down_proj"), 0.4, use_dora=True),
    "vera": Vera(4, ALL),
    "miss": Miss(2, ALL),
    "outputs": Ia3(("k_proj", "down_proj"), ("down_proj",)),
    "inputs": Ia3(ALL, ALL),
    "serial": Bottleneck(3, ("o_proj",), activation=Activation.GELU),
    "parallel": Bottleneck(5, ("o_proj",), BottleneckPlacement.PARALLEL),
    "wide": Bottleneck(9, ("o_proj",)),
    "norms": Selective(("all-norms",)),
    "biases": Selective(("all-biases",)),
}


@contextmanager
def on_kernels(launcher: Any) -> Iterator[None]:
    """Makes tensors look like those of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy_launcher, "launcher_of", lambda _: launcher)
        patch.setattr(torch.Tensor, "is_cuda", True)
        # A build of torch with CUDA has it, and would look for the GPU.
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        yield


def two_steps(executor: Executor, tasks: Any) -> list[StepResult]:
    results = [r for step in (0, 1) for m in pack_round(tasks, [step] * len(tasks)) for r in executor.run(m)]
    assert all(isinstance(result, StepResult) for result in results)
    return results  # type: ignore[return-value]


GROUPABLE = [name for name in METHODS if name != "inputs"]  # there, every operator reads another tensor


@pytest.mark.parametrize("names", [list(METHODS), GROUPABLE], ids=["alone", "in groups"])
def test_tasks_of_every_method_train_as_with_torch_alone(host_launcher: MakeHost, names: list[str]) -> None:
    model, launcher = model_of(CONFIGS["llama-tied"]), host_launcher(0)
    tasks = [task_of(name, method=METHODS[name], seed=i, micro_batch_size=8) for i, name in enumerate(names)]
    plain, on_them = executor_with(model, tasks), executor_with(model, tasks)
    expected = two_steps(plain, tasks)
    before = len(launcher.launched)
    with on_kernels(launcher):
        results = two_steps(on_them, tasks)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.task == theirs.task
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5) and ours.grad_norm == pytest.approx(
            theirs.grad_norm, rel=1e-3
        )
    for name in names:
        ours, theirs_P = (executor.tasks[name].parameters_P for executor in (on_them, plain))
        torch.testing.assert_close(ours, theirs_P, rtol=1e-3, atol=1e-4)
    counts = Counter(launcher.launched[before:])
    num_microbatches = len(pack_round(tasks, [0] * len(tasks))) * 2
    assert counts["multi_adamw"] == counts["multi_grad_norm"] == num_microbatches
    num_nodes = len(on_them.backbone.operators)
    if names == GROUPABLE:  # q, k and v share an input; gate and up, too
        num_nodes -= 3 * len(model.model.layers)
    assert counts["multi_lora_shrink_outer_fp32"] == num_nodes * num_microbatches
    num_modules = len(on_them.backbone.mounted)  # at most one launch before and one after each, for all tasks
    assert 0 < counts["multi_affine_fp32"] <= 2 * num_modules * num_microbatches


def test_a_step_in_bf16_is_the_same_to_its_rounding(host_launcher: MakeHost) -> None:
    model = model_of(CONFIGS["llama-tied"]).to(torch.bfloat16)
    tasks = [task_of(name, method=METHODS[name], seed=i, micro_batch_size=8) for i, name in enumerate(METHODS)]
    plain, on_them = executor_with(model, tasks), executor_with(model, tasks)
    expected = two_steps(plain, tasks)
    with on_kernels(host_launcher(0)):
        results = two_steps(on_them, tasks)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.task == theirs.task and ours.loss == pytest.approx(theirs.loss, rel=2e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)
    for name in METHODS:
        ours, theirs_P = (executor.tasks[name].parameters_P.detach() for executor in (on_them, plain))
        assert (ours - theirs_P).norm() <= 2e-2 * theirs_P.norm(), name
