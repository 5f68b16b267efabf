"""Microbatches that are copied ahead give the same results, whenever the copy arrives, and need no memory that is not
available."""

import copy
import threading

import pytest
import torch

from engine.results import StepResult
from engine.runtime.backbone import Backbone
from engine.runtime.executor import Executor
from engine.runtime.staging import Arrival, StagedMicrobatch, on_device
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, pack_round, task_of

TASKS = [task_of(name, seed=seed, lengths=[7, 12, 3, 9], num_steps=3) for seed, name in enumerate("ab")]


class LateCopy:
    """Copies on another thread only once the copy is waited for: an early reader reads invalid tokens."""

    def __init__(self) -> None:
        self.num_begun = self.num_arrived = 0

    def __call__(self, host: torch.Tensor) -> Arrival:
        self.num_begun += 1
        copy = torch.full_like(host, 1 << 30)

        def arrived() -> torch.Tensor:
            copying = threading.Thread(target=lambda: copy.copy_(host))
            copying.start()
            copying.join()
            self.num_arrived += 1
            return copy

        return arrived


def results_of(executor: Executor, *, staged: bool) -> list[StepResult]:
    """Runs three rounds. With staging, the copies of a round's microbatches all start before the first of them runs."""
    results = []
    for step in range(3):
        microbatches = pack_round(TASKS, [step] * 2)
        if staged:
            microbatches = [executor.stage(microbatch) for microbatch in microbatches]
        results += [result for microbatch in microbatches for result in executor.run(microbatch)]
    return [result for result in results if isinstance(result, StepResult)]


def test_staging_changes_no_step() -> None:
    model, late = model_of(CONFIGS["llama-tied"]), LateCopy()
    plain, ahead = executor_with(model, TASKS), Executor(Backbone(copy.deepcopy(model)), copy=late)
    for task in TASKS:
        ahead.attach(task.assignment)
    expected, staged_results = results_of(plain, staged=False), results_of(ahead, staged=True)
    assert [(r.task, r.step, r.loss, r.grad_norm) for r in staged_results] == [
        (r.task, r.step, r.loss, r.grad_norm) for r in expected
    ]
    assert len(expected) == 6 and late.num_begun == 6 and late.num_arrived >= 6
    for name in "ab":
        assert torch.equal(*(executor.tasks[name].parameters_P for executor in (plain, ahead)))


def test_without_memory_ahead_a_microbatch_is_copied_at_its_turn() -> None:
    def no_room(host: torch.Tensor) -> Arrival:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 MiB")

    executor = Executor(Backbone(model_of(CONFIGS["llama-tied"])), copy=no_room)
    for task in TASKS:
        executor.attach(task.assignment)
    assert len(results_of(executor, staged=True)) == 6


def test_without_a_device_nothing_is_copied() -> None:
    executor, (first, *_) = executor_with(model_of(CONFIGS["llama-tied"]), TASKS), pack_round(TASKS, [0] * 2)
    assert executor.stage(first) is first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_separate_stream_copies_while_the_device_is_busy() -> None:
    """The copy completes while the computing stream still has work, and is read in order."""
    device = torch.device("cuda")
    executor = Executor(Backbone(model_of(CONFIGS["llama-tied"]).to(device)))
    (first, *_) = pack_round(TASKS, [0] * 2)
    busy = torch.randn(8192, 8192, device=device)
    for _ in range(20):
        busy = busy @ busy
    staged = executor.stage(first)
    assert isinstance(staged, StagedMicrobatch)
    assert executor._copy is not None
    executor._copy._stream.synchronize()  # type: ignore[attr-defined]
    assert not torch.cuda.current_stream().query()  # it still computes
    ids_T, targets_T = on_device(staged, device)
    assert torch.equal(ids_T.cpu(), torch.from_numpy(first.token_ids_T))
    assert torch.equal(targets_T.cpu(), torch.from_numpy(first.targets_T))
