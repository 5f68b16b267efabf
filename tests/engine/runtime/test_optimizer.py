"""The optimizers of all tasks, stepped at once, give the results of torch's optimizers step by step."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.runtime import optimizer as optimizers
from engine.runtime.optimizer import TaskOptimizer, step_all
from engine.task import Optimizer, Training
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, pack_round, task_of
from tests.thoroughness import examples


@dataclass
class Pair:
    """Holds a task's optimizer, and torch's over copies of its parameters, with a group for each learning rate."""

    training: Training
    sizes: dict[float, int]
    seed: int
    parts: dict[float, slice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        start = 0
        for factor, size in self.sizes.items():
            self.parts[factor] = slice(start, start + size)
            start += size
        p = torch.randn(start, generator=self.generator)
        self.ours = TaskOptimizer(self.training, p.clone(), torch.zeros(start), self.parts)
        self.leaves = [torch.nn.Parameter(p[part].clone()) for part in self.parts.values()]
        t, groups = self.training, [{"params": [leaf], "lr": 0.0} for leaf in self.leaves]
        if t.optimizer is Optimizer.SGD:
            self.theirs: Any = torch.optim.SGD(groups, momentum=t.momentum, weight_decay=t.weight_decay)
        else:
            self.theirs = torch.optim.AdamW(
                groups, betas=(t.beta1, t.beta2), eps=t.epsilon, weight_decay=t.weight_decay
            )

    def draw_gradients(self, scale: float) -> None:
        g = scale * torch.randn(self.ours.gradients_P.shape, generator=self.generator)
        self.ours.gradients_P.copy_(g)
        for leaf, part in zip(self.leaves, self.parts.values(), strict=True):
            leaf.grad = g[part].clone()

    def step_theirs(self, rate: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.leaves, self.training.max_grad_norm or float("inf"))
        for factor, group in zip(self.parts, self.theirs.param_groups, strict=True):
            group["lr"] = rate * factor
        self.theirs.step()
        return norm.item()


TRAININGS = st.builds(
    Training,
    learning_rate=st.just(1.0),
    optimizer=st.sampled_from(Optimizer),
    weight_decay=st.sampled_from([0.0, 0.1]),
    beta1=st.sampled_from([0.0, 0.8, 0.9]),
    beta2=st.sampled_from([0.95, 0.999]),
    epsilon=st.sampled_from([1e-8, 1e-4]),
    max_grad_norm=st.sampled_from([0.0, 0.5, 1e6]),
    momentum=st.sampled_from([0.0, 0.9]),
)
SIZES = st.dictionaries(st.sampled_from([1.0, 16.0, 0.5]), st.integers(1, 40), min_size=1, max_size=2)


@settings(max_examples=examples(30), deadline=None)
@given(tasks=st.lists(st.tuples(TRAININGS, SIZES), min_size=1, max_size=5), gradient=st.sampled_from([1e-6, 1.0, 1e4]))
def test_equals_torchs_optimizers_step_by_step(tasks: list[tuple[Training, dict[float, int]]], gradient: float) -> None:
    pairs = [Pair(training, sizes, seed) for seed, (training, sizes) in enumerate(tasks)]
    for step in range(4):
        rates = [10.0 ** -(2 + i) / (1 + step) for i in range(len(pairs))]
        for pair in pairs:
            pair.draw_gradients(gradient)
        norms = step_all([pair.ours for pair in pairs], rates)
        expected = [pair.step_theirs(rate) for pair, rate in zip(pairs, rates, strict=True)]
        assert norms == pytest.approx(expected, rel=1e-6)
    for pair in pairs:
        tolerance = {"rtol": 2e-6, "atol": 2e-6} if pair.training.max_grad_norm == 0.5 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(pair.ours.parameters_P, torch.cat([p.detach() for p in pair.leaves]), **tolerance)
        assert not pair.ours.gradients_P.any()


@pytest.mark.parametrize("options", [{}, {"optimizer": Optimizer.SGD, "momentum": 0.9}], ids=["adamw", "sgd"])
def test_a_task_that_is_not_finite_is_not_stepped_and_changes_no_other(options: dict[str, Any]) -> None:
    def make_pairs() -> list[Pair]:
        return [Pair(Training(1.0, **options), {1.0: 7, 4.0: 5}, seed) for seed in range(4)]

    sick, healthy = make_pairs(), make_pairs()
    for pairs in (sick, healthy):
        for pair in pairs:
            pair.draw_gradients(1.0)
    sick[1].ours.gradients_P[6] = float("inf")
    before = [p.ours.parameters_P.clone() for p in sick]
    norms = step_all([p.ours for p in sick], [0.1, 0.1, None, 0.1])  # the third has no rate: its loss is not finite
    step_all([p.ours for p in healthy], [0.1] * 4)
    assert [norm == float("inf") for norm in norms] == [False, True, False, False]
    for i in (1, 2):
        assert torch.equal(sick[i].ours.parameters_P, before[i]) and not sick[i].ours.state()
        assert not any(moments_P.any() for moments_P in sick[i].ours.moments.values())
    for i in (0, 3):
        assert torch.equal(sick[i].ours.parameters_P, healthy[i].ours.parameters_P)
        assert not torch.equal(sick[i].ours.parameters_P, before[i])


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.1}, {"optimizer": Optimizer.SGD, "momentum": 0.9}, {"optimizer": Optimizer.SGD}],
    ids=["adamw", "momentum", "sgd"],
)
def test_the_state_has_the_names_of_torchs_optimizers(options: dict[str, Any]) -> None:
    """Older checkpoints hold torch's state: they still resume, and an older version could read ours."""
    pair = Pair(Training(1.0, max_grad_norm=0.0, **options), {1.0: 6, 16.0: 3}, 0)
    for _ in range(3):
        pair.draw_gradients(1.0)
        pair.step_theirs(0.01)
    pair.ours.parameters_P.copy_(torch.cat([p.detach() for p in pair.leaves]))
    saved = {
        f"{i}.{name}": value.clone()
        for i, leaf in enumerate(pair.leaves)
        for name, value in pair.theirs.state[leaf].items()
        if isinstance(value, torch.Tensor)
    }
    assert pair.ours.shapes() == {name: tuple(value.shape) for name, value in saved.items()}
    pair.ours.restore(saved, 3)
    restored = pair.ours.state()
    assert restored.keys() == saved.keys() and all(torch.equal(restored[name], saved[name]) for name in saved)
    pair.draw_gradients(1.0)
    step_all([pair.ours], [0.01])
    pair.step_theirs(0.01)
    assert torch.equal(pair.ours.parameters_P, torch.cat([p.detach() for p in pair.leaves]))


def test_tasks_that_step_together_need_one_call_of_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[int]] = {"multi_grad_norm": [], "multi_adamw": []}
    for name, counts in calls.items():
        entry = getattr(optimizers, name)
        monkeypatch.setattr(
            optimizers, name, lambda first, *a, e=entry, c=counts: (c.append(len(first)), e(first, *a))[1]
        )
    tasks = [task_of(str(i), seed=i) for i in range(3)]
    executor = executor_with(model_of(CONFIGS["llama"]), tasks)
    results = [result for microbatch in pack_round(tasks, [0] * 3) for result in executor.run(microbatch)]
    assert len(results) == 3 and calls == {"multi_grad_norm": [3], "multi_adamw": [3]}
