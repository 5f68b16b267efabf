"""A task may ask for steps to be run again for it alone: it gets the difference, and nothing else changes."""

import pytest
import torch

from engine.runtime.executor import Executor
from tests.engine.runtime.test_methods import IN_PEFT, OWN
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, task_of, train


def test_every_second_step_is_verified_without_changing_anything() -> None:
    model = model_of(CONFIGS["llama-tied"])
    neighbours = [task_of("b", seed=2, dropout=0.2, lengths=(30, 4), num_steps=4)]
    for i, method in enumerate((IN_PEFT | OWN).values()):
        checked, plain = (
            task_of("a", seed=i, method=method, num_steps=4, lengths=(7, 12, 3, 9, 5), **options)
            for options in (dict(verify_every_steps=2), {})
        )
        executors = [executor_with(model, [task, *neighbours]) for task in (checked, plain)]
        results, expected = (
            train(executor, [task, *neighbours], 4)["a"]
            for executor, task in zip(executors, (checked, plain), strict=True)
        )
        checks = [result.shadow_check for result in results]
        assert [check is not None for check in checks] == [False, True] * 2
        assert all(check.loss_difference < 1e-5 and check.gradient_difference < 1e-4 for check in checks if check)
        assert [result.loss for result in results] == [result.loss for result in expected]
        assert torch.equal(*(executor.tasks["a"].parameters_P for executor in executors))


def test_a_neighbour_that_leaks_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task_of("a", verify_every_steps=1, num_steps=2), task_of("b", seed=2, lengths=(30, 4), num_steps=2)]
    executor = executor_with(model_of(CONFIGS["llama"]), tasks)
    right = Executor._target_rows

    def averaged_over_the_batch(self: Executor, microbatch, resident):
        rows_M, weights_M = right(self, microbatch, resident)
        return rows_M, weights_M * len(microbatch.ranges)

    monkeypatch.setattr(Executor, "_target_rows", averaged_over_the_batch)
    [first, *_] = train(executor, tasks, 1)["a"]
    assert first.shadow_check is not None and first.shadow_check.gradient_difference > 0.1
