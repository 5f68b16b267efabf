"""Microbatches replayed as graphs give the results of eager ones; without a graph, every task trains eagerly.

The graphs are in software (`software_graph`), as strict as CUDA's; on a GPU they are CUDA's.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.alignment.microbatch import MicrobatchKind
from engine.methods import Bottleneck, BottleneckPlacement, Ia3, Lora, LoraBias, Miss, Prefix, Prompt, Selective, Vera
from engine.methods.base import Method
from engine.results import EvaluationResult, Result, StepResult, TaskFailure
from engine.runtime import cuda_graphs
from engine.runtime.backbone import Backbone
from engine.runtime.calibration import calibrate
from engine.runtime.cuda_graphs import CudaGraphs
from engine.runtime.executor import Executor
from engine.runtime.out_of_memory import OutOfMemoryError
from tests.engine.kernels.conftest import MakeHost, host_launcher
from tests.engine.kernels.host.launcher import HostLauncher
from tests.engine.runtime.software_graph import SoftwareRecording, all_varlen
from tests.engine.runtime.test_on_kernels import on_kernels
from tests.engine.runtime.tiny import CONFIGS, TinyTask, executor_with, model_of, pack_round, task_of

__all__ = ["host_launcher"]

ALL = ("all-linear",)
METHODS: dict[str, Method] = {
    "lora": Lora(3, 8.0, ALL, bias=LoraBias.ALL),
    "dropout": Lora(4, 8.0, ALL, 0.3),
    "dora": Lora(2, 3.0, ("q_proj", "down_proj"), use_dora=True),
    "vera": Vera(4, ALL, 0.2),
    "miss": Miss(2, ALL),
    "ia3": Ia3(("k_proj", "down_proj"), ("down_proj",)),
    "serial": Bottleneck(3, ("o_proj",)),
    "parallel": Bottleneck(5, ("o_proj",), BottleneckPlacement.PARALLEL),
    "norms": Selective(("all-norms",)),
}


@pytest.fixture(autouse=True)
def on_varlen_attention() -> Iterator[None]:
    with all_varlen():
        yield


class Counting(SoftwareRecording):
    """Adds an entry to `replays` for each replay of any recording."""

    replays: list[None]

    def replay(self) -> torch.Tensor:
        self.replays.append(None)
        return super().replay()


class Again(SoftwareRecording):
    """Records nothing: a replay runs the work again."""

    def capture(self, work: Callable[[], torch.Tensor]) -> None:
        self._work = work

    def replay(self) -> torch.Tensor:
        return self.run(self._work)


def executor_of(
    model: Any, tasks: Sequence[TinyTask], kind: type[SoftwareRecording], launcher: HostLauncher | None = None,
    capacity: int = 8,
) -> Executor:  # fmt: skip
    backbone = Backbone(copy.deepcopy(model), packs_weights=False)  # as on a GPU
    executor = Executor(backbone, graphs=CudaGraphs(backbone, capacity, lambda: kind(executor, launcher)))
    for task in tasks:
        executor.attach(task.assignment)
    return executor


def tasks_of(methods: dict[str, Method], lengths: Callable[[int], Sequence[int]], **training: Any) -> list[TinyTask]:
    return [
        task_of(name, method=method, seed=i, lengths=lengths(i), num_steps=99, micro_batch_size=2, **training)
        for i, (name, method) in enumerate(methods.items())
    ]


def drawn(seed: int, most: int = 12) -> list[int]:
    return np.random.default_rng(seed).integers(2, most + 1, 24).tolist()  # type: ignore[no-any-return]


def trained(executor: Executor, tasks: Sequence[TinyTask], steps: range, **kind: Any) -> list[Result]:
    microbatches = [m for step in steps for m in pack_round(tasks, [step] * len(tasks), **kind)]
    return [result for microbatch in microbatches for result in executor.run(microbatch)]


def assert_same_bits(ours: Executor, theirs: Executor) -> None:
    for name, run in ours.tasks.items():
        assert torch.equal(run.parameters_P, theirs.tasks[name].parameters_P), name


def values_of(results: Sequence[Result]) -> list[tuple[Any, ...]]:
    assert all(isinstance(result, StepResult) for result in results)
    return [(r.task, r.step, r.loss, r.grad_norm, r.num_target_tokens) for r in results]  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["llama-tied", "mistral-window", "gemma3", "gpt2"])
def test_replays_give_an_eager_passs_bits(architecture: str) -> None:
    replays, model = [], model_of(CONFIGS[architecture])
    counting = type("", (Counting,), {"replays": replays})
    method = Lora(3, 8.0, ALL)
    tasks = tasks_of({"a": method, "b": Lora(8, 8.0, ALL), "c": method}, drawn)
    replaying, again, plain = (
        executor_of(model, tasks, counting), executor_of(model, tasks, Again), executor_with(model, tasks),
    )  # fmt: skip
    results = [trained(executor, tasks, range(8)) for executor in (replaying, again, plain)]
    assert values_of(results[0]) == values_of(results[1])
    assert_same_bits(replaying, again)
    assert len(replays) >= 5  # of 16 microbatches: each bucket takes two
    for ours, theirs in zip(values_of(results[0]), values_of(results[2]), strict=True):
        assert ours[:2] == theirs[:2] and ours[2:4] == pytest.approx(theirs[2:4], rel=1e-4) and ours[4] == theirs[4]
    for name in "abc":
        ours, theirs_P = (executor.tasks[name].parameters_P for executor in (replaying, plain))
        torch.testing.assert_close(ours, theirs_P, rtol=1e-3, atol=1e-4)


def replaying_executor(
    model: Any, tasks: Sequence[TinyTask], launcher: HostLauncher | None = None, capacity: int = 8
) -> tuple[Executor, list[None]]:
    """Returns an executor, and a list with an entry for each replay."""
    replays: list[None] = []
    return executor_of(model, tasks, type("", (Counting,), {"replays": replays}), launcher, capacity), replays


def test_tasks_of_every_method_on_the_kernels(host_launcher: MakeHost) -> None:
    """Covers tables with addresses in the capture's memory, which are written at the end of the capture."""
    model, launcher = model_of(CONFIGS["llama-tied"]), host_launcher(0)
    tasks = tasks_of(METHODS, lambda i: [9, 12, 10, 13, 11, 9, 14, 12], global_batch_size=2)
    with on_kernels(launcher):
        replaying, replays = replaying_executor(model, tasks, launcher)
        again = executor_of(model, tasks, Again, launcher)
        results = [trained(executor, tasks, range(4)) for executor in (replaying, again)]
    assert values_of(results[0]) == values_of(results[1])
    assert_same_bits(replaying, again)
    assert len(replays) == 2  # of four: seen, captured, verified, used
    plain = executor_with(model, tasks)
    for ours, theirs in zip(
        values_of(results[0]), values_of(trained(plain, tasks, range(4))), strict=True
    ):  # also masks
        assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], rel=1e-4)


def test_tasks_join_and_leave_between_replays() -> None:
    model, rows = model_of(CONFIGS["llama-tied"]), lambda i: [9, 12, 10, 13, 11, 9, 14, 12]
    tasks = tasks_of({name: Lora(3, 8.0, ALL) for name in "abc"}, rows, global_batch_size=2)
    a, b, c = tasks
    (replaying, replays), again = replaying_executor(model, tasks[:2]), executor_of(model, tasks[:2], Again)
    results: list[list[tuple[Any, ...]]] = []
    for executor in (replaying, again):
        trained_results = trained(executor, [a, b], range(4))
        executor.detach("b")
        executor.attach(c.assignment)
        trained_results += trained(executor, [a, c], range(4))
        executor.attach(b.assignment)  # again, under the name of a task whose graphs were forgotten
        trained_results += trained(executor, [b, a], range(4))
        trained_results += trained(executor, [a, b, c], range(4))
        executor.detach("c")
        trained_results += trained(executor, [a, b, c], range(2))  # its tokens are still in the stream
        results.append(values_of(trained_results))
    assert results[0] == results[1] and len(replays) >= 4 * 2
    assert_same_bits(replaying, again)
    assert {task.assignment.task for bucket in replaying._graphs._graphs for task in bucket.tasks} == {"a", "b"}  # type: ignore[union-attr]


def test_evaluations_are_replayed_too() -> None:
    model, tasks = model_of(CONFIGS["llama-tied"]), tasks_of({"a": Lora(3, 8.0, ALL, 0.3)}, lambda i: [9, 12, 10, 13])
    (replaying, replays), plain = replaying_executor(model, tasks), executor_with(model, tasks)
    replayed, expected = (
        trained(executor, tasks, range(4), kind=MicrobatchKind.EVALUATE) for executor in (replaying, plain)
    )
    assert len(replays) == 6  # they have no dropout, which training has
    for ours, theirs in zip(replayed, expected, strict=True):
        assert isinstance(ours, EvaluationResult) and isinstance(theirs, EvaluationResult)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6) and ours.num_target_tokens == theirs.num_target_tokens


@pytest.mark.parametrize(
    "method",
    [Lora(3, 8.0, ("q_proj",), 0.3, use_dora=True), Prompt(2), Prefix(3)],
    ids=["dora's dropout", "prompt", "prefix"],
)
def test_beside_a_task_that_cannot_be_replayed_all_run_eagerly(method: Method) -> None:
    tasks = tasks_of({"a": Lora(3, 8.0, ALL), "b": method}, lambda i: [9, 12, 10, 13])
    executor, replays = replaying_executor(model_of(CONFIGS["llama-tied"]), tasks)
    trained(executor, tasks, range(4))
    assert not replays
    trained(executor, tasks[:1], range(4, 8))
    assert replays


def test_attention_that_flash_attention_does_not_do_is_not_replayed() -> None:
    tasks = tasks_of({"a": Lora(3, 8.0, ALL)}, lambda i: [9, 12, 10, 13])
    executor, replays = replaying_executor(model_of(CONFIGS["gemma2"]), tasks)  # soft-capping
    trained(executor, tasks, range(4))
    assert not replays


class Refusing(SoftwareRecording):
    """Raises in captures the errors that a device raises."""

    error: Exception

    def capture(self, work: Callable[[], torch.Tensor]) -> None:
        super().capture(work)
        raise self.error


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError("capture invalidated")],
    ids=["memory", "invalid"],
)
def test_a_failed_capture_changes_no_result(error: Exception) -> None:
    model, tasks = model_of(CONFIGS["llama-tied"]), tasks_of({"a": Lora(3, 8.0, ALL)}, lambda i: [9, 12, 10, 13])
    failing, again = (
        executor_of(model, tasks, type("", (Refusing,), {"error": error})),
        executor_of(model, tasks, Again),
    )
    plain = executor_with(model, tasks)
    results = [values_of(trained(executor, tasks, range(4))) for executor in (failing, again, plain)]
    assert results[0][0] == results[1][0]
    for ours, theirs in zip(results[0], results[2], strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=1e-5)


class Unable(SoftwareRecording):
    """Refuses to run a bucket, before or after the backward pass."""

    is_late: bool

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.is_late:
            super().run(work)
        raise RuntimeError("this kernel takes no empty segments")


def test_a_bucket_that_does_not_run_is_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model, tasks = model_of(CONFIGS["llama-tied"]), tasks_of({"a": Lora(3, 8.0, ALL)}, lambda i: [9, 12, 10, 13])
    unable = executor_of(model, tasks, type("", (Unable,), {"is_late": False}))
    plain = executor_with(model, tasks, packs_weights=False)
    assert values_of(trained(unable, tasks, range(3))) == values_of(trained(plain, tasks, range(3)))
    assert "empty segments" in caplog.text


def test_work_that_has_written_gradients_is_not_run_again() -> None:
    tasks = tasks_of({"a": Lora(3, 8.0, ALL)}, lambda i: [9, 12, 10, 13])
    executor = executor_of(model_of(CONFIGS["llama-tied"]), tasks, type("", (Unable,), {"is_late": True}))
    with pytest.raises(RuntimeError, match="empty segments"):
        trained(executor, tasks, range(3))


def test_work_that_waits_for_the_device_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    """Some models' position embeddings read the length of the longest sequence, and so wait for the device."""
    model, tasks = model_of(CONFIGS["llama-tied"]), tasks_of({"a": Lora(3, 8.0, ALL)}, lambda i: [9, 12, 10, 13])
    executor, replays = replaying_executor(model, tasks)
    executor.backbone.model.register_forward_hook(lambda *_: None)
    base = executor.backbone.model.base_model
    base.norm.register_forward_hook(lambda module, inputs, y: y * (1.0 if y.abs().max().item() > 0 else 2.0))
    plain = executor_with(model, tasks)
    values, expected = (values_of(trained(executor, tasks, range(3))) for executor in (executor, plain))
    assert not replays and "waits for the device" in caplog.text
    assert [ours[2] for ours in values] == pytest.approx([theirs[2] for theirs in expected], rel=1e-5)


class Forgetful(SoftwareRecording):
    """Replays with the inputs of the capture, as if the host had decided something that differs between
    microbatches."""

    def capture(self, work: Callable[[], torch.Tensor]) -> None:
        super().capture(work)
        self._moving = work.args[1].token_ids_T  # type: ignore[attr-defined]
        self._frozen = self._moving.clone()

    def replay(self) -> torch.Tensor:
        now = self._moving.clone()
        self._moving.copy_(self._frozen)
        result = super().replay()
        self._moving.copy_(now)
        return result


def test_a_graph_with_different_results_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    model, tasks = model_of(CONFIGS["llama-tied"]), tasks_of({"a": Lora(3, 8.0, ALL)}, lambda i: [9, 12, 10, 13])
    wrong, again = executor_of(model, tasks, Forgetful), executor_of(model, tasks, Again)
    assert values_of(trained(wrong, tasks, range(2))) == values_of(trained(again, tasks, range(2)))
    assert "different results" in caplog.text
    assert_same_bits(wrong, again)


def test_without_memory_to_verify_a_replay_all_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tasks_of({"a": Lora(3, 8.0, ALL)}, lambda i: [9, 12, 10, 13])
    executor, replays = replaying_executor(model_of(CONFIGS["llama-tied"]), tasks)
    monkeypatch.setattr(cuda_graphs, "_copies", lambda _: torch.empty(1 << 50))
    plain = executor_with(executor.backbone.shadow, tasks)
    values, expected = (values_of(trained(ours, tasks, range(4))) for ours in (executor, plain))
    assert not replays and len(executor._graphs) == 0  # type: ignore[arg-type]
    assert [ours[2] for ours in values] == pytest.approx([theirs[2] for theirs in expected], rel=1e-5)


def test_graphs_are_few_and_idle_ones_make_room() -> None:
    tasks = tasks_of({name: Lora(3, 8.0, ALL) for name in "ab"}, lambda i: [9, 12, 10, 13], global_batch_size=2)
    executor, replays = replaying_executor(model_of(CONFIGS["llama-tied"]), tasks, capacity=1)
    trained(executor, tasks[:1], range(4))
    assert len(replays) == 2
    trained(executor, tasks[1:], range(14))
    assert len(replays) == 2  # the other task's graph was replayed recently
    trained(executor, tasks[1:], range(14, 20))
    assert len(replays) > 2 and len(executor._graphs) == 1  # type: ignore[arg-type]


def test_a_lack_of_memory_releases_the_graphs() -> None:
    tasks = tasks_of({"a": Lora(3, 8.0, ALL)}, lambda i: [9, 12, 10, 13])
    executor, _ = replaying_executor(model_of(CONFIGS["llama-tied"]), tasks)
    trained(executor, tasks, range(2))
    assert len(executor._graphs) > 0  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutOfMemoryError):
        patch.setattr(executor._graphs, "run", lambda *_: torch.empty(1 << 50))
        trained(executor, tasks, range(2, 3))
    assert len(executor._graphs) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [2, 4], ids=["while a graph is proven", "in a replay"])
def test_a_neighbour_that_is_not_finite_fails_alone(step: int) -> None:
    model, rows = model_of(CONFIGS["llama-tied"]), lambda i: [9, 12, 10, 13, 11, 9, 14, 12]
    tasks = tasks_of({"a": Lora(3, 8.0, ALL), "b": Lora(3, 8.0, ALL)}, rows, global_batch_size=2)
    (executor, replays), alone = replaying_executor(model, tasks), executor_of(model, tasks, Again)
    results = trained(executor, tasks, range(step))
    with torch.no_grad():
        executor.tasks["b"].parameters_P.fill_(torch.nan)
    results += trained(executor, tasks, range(step, 8))
    failed = [result for result in results if isinstance(result, TaskFailure)]
    assert [result.task for result in failed] == ["b"] and len(replays) >= 3 and len(executor._graphs) == 1  # type: ignore[arg-type]
    trained(alone, tasks, range(step))
    alone.detach("b")
    trained(alone, tasks[:1], range(step, 8))
    ours, theirs = (side.tasks["a"].parameters_P for side in (executor, alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_cpu_has_no_graphs() -> None:
    backbone = Backbone(model_of(CONFIGS["llama-tied"]))
    assert CudaGraphs.of(backbone, 4) is None and CudaGraphs.of(backbone, 0) is None


def test_calibration_captures_nothing() -> None:
    executor, replays = replaying_executor(model_of(CONFIGS["llama-tied"]), [])
    assert calibrate(executor, 0.0, 32)
    assert not replays and len(executor._graphs) == 0  # type: ignore[arg-type]
