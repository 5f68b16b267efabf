"""Real allocators that are asked for more than there is."""

import pytest
import torch

from engine.errors import WillNeverFitError
from engine.results import StepResult, TaskFailure
from engine.runtime.out_of_memory import in_short, is_out_of_memory
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, pack_round, task_of


def refusal(ask) -> Exception:  # type: ignore[no-untyped-def]
    with pytest.raises(Exception) as caught:
        ask()
    return caught.value


def test_the_cpus_allocators_refusal_is_known_and_told_with_its_bytes() -> None:
    error = refusal(lambda: torch.empty(1 << 50))
    assert is_out_of_memory(error)
    assert in_short(error) == f"tried to allocate {4 << 50} bytes"
    assert is_out_of_memory(refusal(lambda: bytearray(1 << 60)))


def test_what_cuda_says_is_known() -> None:
    """Its text, as the allocator of torch 2 writes it; no GPU is needed to read it."""
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 GiB is free."
    )
    error = torch.OutOfMemoryError(text)
    assert is_out_of_memory(error) and in_short(error) == "Tried to allocate 2.00 GiB"
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


def test_other_failures_are_no_shortage() -> None:
    assert not is_out_of_memory(refusal(lambda: torch.ones(2) @ torch.ones(3)))
    assert not is_out_of_memory(ValueError("out of memory, said a user"))


def test_a_task_whose_optimizer_finds_no_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task_of(name, seed=seed, lengths=[7, 12, 3, 9], num_steps=3) for seed, name in enumerate("abc")]
    executor = executor_with(model_of(CONFIGS["llama-tied"]), tasks)
    asked = executor.tasks["b"].optimizer
    monkeypatch.setattr(asked, "step", lambda: torch.empty(1 << 50))
    results = {r.task: r for m in pack_round(tasks, [0] * 3) for r in executor.run(m)}
    failure = results.pop("b")
    assert isinstance(failure, TaskFailure) and isinstance(failure.error, WillNeverFitError)
    assert set(executor.tasks) == {"a", "c"} and all(isinstance(r, StepResult) for r in results.values())
