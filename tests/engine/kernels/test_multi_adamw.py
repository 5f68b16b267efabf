"""Tests AdamW steps of many tasks, after their norms, against torch's clip_grad_norm_ and AdamW task by task."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels import multi_adamw as adamw
from engine.kernels import multi_grad_norm as grad_norm
from engine.kernels.multi_adamw import AdamWGroup
from tests.engine.kernels.conftest import MakeLauncher
from tests.thoroughness import examples

TENSORS = ("parameters_P", "gradients_P", "first_moments_P", "second_moments_P")
SIZES = st.lists(st.one_of(st.integers(0, 300), st.sampled_from([1, 128, 1000, 5000])), min_size=1, max_size=6)


def draw(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def groups_of(sizes: list[int], step: int) -> list[AdamWGroup]:
    """Return one task of each size, each with its own hyperparameters."""
    return [
        AdamWGroup(
            task=i,
            parameters_P=draw(size, 10 * i),
            gradients_P=3 * draw(size, 10 * i + 1),
            first_moments_P=draw(size, 10 * i + 2) if step > 1 else torch.zeros(size),
            second_moments_P=draw(size, 10 * i + 3).square() if step > 1 else torch.zeros(size),
            step=step,
            learning_rate=1e-2 / (i + 1),
            weight_decay=0.1 * (i % 2),
            beta1=0.9 - 0.1 * (i % 3),
            beta2=0.99,
            epsilon=1e-6,
            max_norm=[0.0, 1.0, 1e6][i % 3],
        )
        for i, size in enumerate(sizes)
    ]


def by_torch(group: AdamWGroup) -> tuple[torch.Tensor, ...]:
    """Return (parameters, first moments, second moments) after torch's clip_grad_norm_ and AdamW."""
    parameter = torch.nn.Parameter(group.parameters_P.clone())
    parameter.grad = group.gradients_P.clone()
    betas, rate = (group.beta1, group.beta2), group.learning_rate
    optimizer = torch.optim.AdamW([parameter], lr=rate, betas=betas, eps=group.epsilon, weight_decay=group.weight_decay)
    moments = {"exp_avg": group.first_moments_P.clone(), "exp_avg_sq": group.second_moments_P.clone()}
    optimizer.state[parameter] = {"step": torch.tensor(float(group.step - 1)), **moments}
    if group.max_norm > 0:
        torch.nn.utils.clip_grad_norm_([parameter], group.max_norm)
    optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def run(kind: str, make_launcher: MakeLauncher, groups: list[AdamWGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute norms and a step, by the reference or by the kernels."""
    gradients = [group.gradients_P for group in groups]
    if kind == "reference":
        norms, is_finite = grad_norm.multi_grad_norm(gradients)
        adamw.multi_adamw(groups, norms, is_finite)
    else:
        launcher = make_launcher(1)
        on_device = [replace(group, **{n: getattr(group, n).to(launcher.device) for n in TENSORS}) for group in groups]
        norms, is_finite = grad_norm.launch_multi_grad_norm(launcher, [group.gradients_P for group in on_device])
        adamw.launch_multi_adamw(launcher, on_device, norms, is_finite)
        for group, done in zip(groups, on_device, strict=True):
            for tensor, result in zip(group.tensors, done.tensors, strict=True):
                tensor.copy_(result)
    return norms.cpu(), is_finite.cpu()


@pytest.mark.parametrize("kind", ["reference", "kernel"])
@settings(max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, step=st.sampled_from([1, 2, 1000]))
def test_equals_torch(make_launcher: MakeLauncher, kind: str, sizes: list[int], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "CHUNK", 256)
        patch.setattr(grad_norm, "CHUNK", 256)
        groups = groups_of(sizes, step)
        expected = [by_torch(group) for group in groups]
        lengths = torch.tensor([group.gradients_P.double().norm() for group in groups])
        norms, is_finite = run(kind, make_launcher, groups)
    torch.testing.assert_close(norms, lengths.float())
    assert is_finite.tolist() == [1] * len(groups)
    for group, (parameters, first, second) in zip(groups, expected, strict=True):
        torch.testing.assert_close(group.parameters_P, parameters, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(group.first_moments_P, first, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(group.second_moments_P, second, rtol=2e-6, atol=2e-6)
        assert not group.gradients_P.any()


@pytest.mark.parametrize("kind", ["reference", "kernel"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_the_task_with_nan_is_left_unchanged(make_launcher: MakeLauncher, kind: str, value: float) -> None:
    healthy, groups = groups_of([700, 300, 900], 3), groups_of([700, 300, 900], 3)
    groups[1].gradients_P[299] = value
    before = [tensor.clone() for tensor in groups[1].tensors]
    run(kind, make_launcher, healthy)
    norms, is_finite = run(kind, make_launcher, groups)
    assert is_finite.tolist() == [1, 0, 1] and not norms[1].isfinite()
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, groups[1].tensors, strict=True))
    for i in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(healthy[i].tensors, groups[i].tensors, strict=True))


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_a_place_in_memory_changes_no_bit(make_launcher: MakeLauncher, offset: int) -> None:
    """Arrays may be aligned to 16 bytes or not, as LoRA+'s second group in a task's buffer."""
    launcher, placed = make_launcher(1), []
    for start in (0, offset):
        (group,) = groups_of([4099], 5)
        spaces = {name: torch.empty(start + 4099, device=launcher.device)[start:] for name in TENSORS}
        placed.append(replace(group, **{name: space.copy_(getattr(group, name)) for name, space in spaces.items()}))
    norms = [grad_norm.launch_multi_grad_norm(launcher, [group.gradients_P]) for group in placed]
    assert all(torch.equal(a, b) for a, b in zip(*norms, strict=True))
    for group in placed:
        adamw.launch_multi_adamw(launcher, [group], *norms[0])
    assert all(torch.equal(a, b) for a, b in zip(*(group.tensors for group in placed), strict=True))


def test_neighbours_do_not_change_a_bit(make_launcher: MakeLauncher) -> None:
    (alone,), beside = groups_of([70000], 2), groups_of([70000, 10, 200000], 2)
    run("kernel", make_launcher, [alone])
    run("kernel", make_launcher, beside)
    assert all(torch.equal(a, b) for a, b in zip(alone.tensors, beside[0].tensors, strict=True))


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        grad_norm.multi_grad_norm([torch.zeros(3).double()])
    (group,) = groups_of([4], 1)
    short = AdamWGroup(**{**vars(group), "first_moments_P": torch.zeros(3)})
    with pytest.raises(ValueError, match="3 elements"):
        adamw.multi_adamw([short], torch.ones(1), torch.ones(1).int())
