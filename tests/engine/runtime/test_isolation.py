"""A task's failure, absence or departure never affects another task."""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch

from engine.alignment.microbatch import MicrobatchKind
from engine.errors import InvalidInputError, NonFiniteError
from engine.results import EvaluationResult, StepResult, TaskFailure
from engine.runtime.executor import Executor
from tests.engine.runtime.tiny import CONFIGS, TinyTask, executor_with, model_of, pack_round, task_of, train


def poison(executor: Executor, task: str, value: float) -> None:
    with torch.no_grad():
        executor.tasks[task].parameters_P[-3] = value


def run_round(executor: Executor, tasks: Sequence[TinyTask], step: int = 0) -> dict[str, object]:
    return {r.task: r for m in pack_round(tasks, [step] * len(tasks)) for r in executor.run(m)}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_task_is_quarantined_alone(architecture: str, value: float) -> None:
    model = model_of(CONFIGS[architecture])
    tasks = [task_of("a", seed=1), task_of("sick", seed=2, dropout=0.2), task_of("c", seed=3)]
    executor, healthy = executor_with(model, tasks), executor_with(model, tasks)
    poison(executor, "sick", value)
    results, expected = run_round(executor, tasks), run_round(healthy, tasks)
    failure = results.pop("sick")
    assert isinstance(failure, TaskFailure) and isinstance(failure.error, NonFiniteError)
    assert executor.tasks.keys() == {"a", "c"} and failure.step == 0
    assert all("sick" not in operator.adapters for operator in executor.backbone.operators.values())
    for name in ("a", "c"):
        assert isinstance(results[name], StepResult)
        assert results[name].loss == expected[name].loss  # type: ignore[attr-defined]
        assert torch.equal(executor.tasks[name].parameters_P, healthy.tasks[name].parameters_P)


def test_a_gradient_that_is_not_finite_is_quarantined_before_anything_is_written() -> None:
    task = task_of("a")
    executor = executor_with(model_of(CONFIGS["llama"]), [task])
    run = executor.tasks["a"]
    before = run.parameters_P.detach().clone()
    assert run.parameters_P.grad is not None
    run.parameters_P.grad[5] = float("nan")
    failure = run_round(executor, [task])["a"]
    assert isinstance(failure, TaskFailure) and torch.equal(run.parameters_P, before) and not run.optimizer.state()


def test_a_non_finite_evaluation_is_a_failure() -> None:
    tasks = [task_of("a"), task_of("sick")]
    executor = executor_with(model_of(CONFIGS["llama"]), tasks)
    poison(executor, "sick", float("nan"))
    microbatches = pack_round(tasks, [0, 0], kind=MicrobatchKind.EVALUATE)
    results = {r.task: r for m in microbatches for r in executor.run(m)}
    assert isinstance(results["a"], EvaluationResult) and isinstance(results["sick"], TaskFailure)
    assert executor.tasks.keys() == {"a"}


def test_tokens_of_a_task_that_left_midway_are_ignored() -> None:
    model = model_of(CONFIGS["llama"])
    tasks = [task_of("leaver", seed=2), task_of("stayer", seed=3)]
    executor, alone = executor_with(model, tasks), executor_with(model, tasks[1:])
    first, second = pack_round(tasks, [0, 0])
    assert executor.run(first) == []
    executor.detach("leaver")
    [result] = executor.run(second)
    expected = run_round(alone, tasks[1:])["stayer"]
    assert isinstance(result, StepResult) and isinstance(expected, StepResult)
    assert (result.task, result.loss) == ("stayer", pytest.approx(expected.loss, rel=1e-6))
    executor.detach("stayer")
    assert executor.run(first) == executor.run(second) == []
    assert all(not operator.adapters for operator in executor.backbone.operators.values())


def test_a_refused_task_leaves_nothing_mounted() -> None:
    executor = executor_with(model_of(CONFIGS["llama"]), [])
    with pytest.raises(InvalidInputError, match=r'"q_project" matches no.*q_proj.*all-linear'):
        executor.attach(task_of("a", targets=["q_proj", "q_project"]).assignment)
    assert not executor.tasks and all(not o.adapters for o in executor.backbone.operators.values())


def test_evaluation_changes_nothing_and_is_the_mean_over_its_targets() -> None:
    task = task_of("a", dropout=0.5, lengths=(9, 14, 5))
    executor = executor_with(model_of(CONFIGS["llama"]), [task])
    train(executor, [task], 1)
    before = executor.checkpoint("a")
    losses = []
    for size in (1, 3):
        cut = dataclasses.replace(
            task, spec=dataclasses.replace(
                task.spec, training=dataclasses.replace(task.spec.training, micro_batch_size=size)
            )
        )  # fmt: skip
        results = [r for m in pack_round([cut], [0], kind=MicrobatchKind.EVALUATE) for r in executor.run(m)]
        assert [type(r) for r in results] == [EvaluationResult]
        losses.append(results[0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    after = executor.checkpoint("a")
    assert all(torch.equal(before.tensors[n], after.tensors[n]) for n in before.tensors)


def test_seconds_and_tokens_are_shared_out_and_add_up() -> None:
    tasks = [task_of("a", lengths=(9, 7), micro_batch_size=4), task_of("b", lengths=(30,), micro_batch_size=4)]
    executor = executor_with(model_of(CONFIGS["llama"]), tasks)
    ticks = itertools.count()
    executor._clock = lambda: float(next(ticks))
    results = run_round(executor, tasks)
    a, b = results["a"], results["b"]
    assert isinstance(a, StepResult) and isinstance(b, StepResult)
    assert (a.num_effective_tokens, a.num_padding_tokens, b.num_effective_tokens, b.num_padding_tokens) == (
        16,
        0,
        30,
        2,
    )
    assert (a.seconds, b.seconds) == (pytest.approx(16 / 48), pytest.approx(32 / 48))
    assert a.num_neighbours == b.num_neighbours == 1
