"""Asks real allocators for more memory than there is."""

import pytest
import torch

from engine.results import StepResult
from engine.runtime import executor as module
from engine.runtime.out_of_memory import OutOfMemoryError, is_out_of_memory, summary
from engine.runtime.task_state import TaskAssignment
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, pack_round, task_of


def refusal(ask) -> Exception:  # type: ignore[no-untyped-def]
    with pytest.raises(Exception) as caught:
        ask()
    return caught.value


def test_the_cpu_allocators_error_is_detected_with_its_bytes() -> None:
    error = refusal(lambda: torch.empty(1 << 50))
    assert is_out_of_memory(error)
    assert summary(error) == f"tried to allocate {4 << 50} bytes"
    assert is_out_of_memory(refusal(lambda: bytearray(1 << 60)))


def test_cudas_errors_are_detected() -> None:
    """The text is what the allocator of torch 2 writes; no GPU is needed to read it."""
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 GiB is free."
    )
    error = torch.OutOfMemoryError(text)
    assert is_out_of_memory(error) and summary(error) == "Tried to allocate 2.00 GiB"
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


def test_other_failures_are_not_out_of_memory_errors() -> None:
    assert not is_out_of_memory(refusal(lambda: torch.ones(2) @ torch.ones(3)))
    assert not is_out_of_memory(ValueError("out of memory, said a user"))


def test_a_task_without_memory_is_not_attached_and_changes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task_of(name, seed=seed, lengths=[7, 12, 3, 9], num_steps=3) for seed, name in enumerate("ab")]
    executor = executor_with(model_of(CONFIGS["llama-tied"]), tasks)
    with monkeypatch.context() as patched:
        patched.setattr(module, "TaskTrainingState", lambda *arguments: torch.empty(1 << 50))
        with pytest.raises(OutOfMemoryError, match=f"tried to allocate {4 << 50} bytes"):
            executor.attach(TaskAssignment("large", tasks[0].spec, 3))
    assert set(executor.tasks) == {"a", "b"}
    results = [r for m in pack_round(tasks, [0] * 2) for r in executor.run(m)]
    assert all(isinstance(r, StepResult) for r in results)


def test_a_microbatch_without_memory_leaves_every_task_before_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the step is restarted, the results are those of an executor that never failed."""
    tasks = [task_of(name, seed=seed, lengths=[7, 12, 3, 9], num_steps=3) for seed, name in enumerate("ab")]
    failing, steady = (executor_with(model_of(CONFIGS["llama-tied"]), tasks) for _ in range(2))
    microbatches = pack_round(tasks, [0] * 2)
    with monkeypatch.context() as patched:
        patched.setattr(module, "segment_cross_entropy", lambda *arguments: torch.empty(1 << 50))
        with pytest.raises(OutOfMemoryError) as caught:
            failing.run(microbatches[0])
    assert caught.value.__context__ is None and caught.value.__cause__ is None  # no frame keeps its tensors alive
    for run in failing.tasks.values():
        run.restart_step()
    for executor in (failing, steady):
        for microbatch in microbatches:
            executor.run(microbatch)
    for name in "ab":
        assert torch.equal(*(executor.tasks[name].parameters_P for executor in (failing, steady)))
