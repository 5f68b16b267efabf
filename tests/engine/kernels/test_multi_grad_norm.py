"""Tests gradient norms of many tasks against float64: the kernel, run on this CPU, and the reference."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels import multi_grad_norm as entry
from tests.engine.kernels.conftest import MakeLauncher
from tests.engine.kernels.poison import poisoned_memory
from tests.thoroughness import examples

__all__ = ["poisoned_memory"]

KINDS = ["reference", "kernel"]


def draw(size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def run(kind: str, launcher: Any, gradients: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "reference":
        return entry.multi_grad_norm(gradients)
    norms, is_finite = entry.launch_multi_grad_norm(launcher, [gradient.to(launcher.device) for gradient in gradients])
    return norms.cpu(), is_finite.cpu()


SIZES = st.lists(st.one_of(st.integers(0, 300), st.sampled_from([1, 128, 1000, 70000])), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, scale=st.sampled_from([1e-18, 1.0, 1e18]), seed=st.integers(0, 1))
def test_equals_float64(make_launcher: MakeLauncher, kind: str, sizes: list[int], scale: float, seed: int) -> None:
    """Squares may overflow or underflow a float."""
    gradients = [draw(size, i, scale) for i, size in enumerate(sizes)]
    expected = torch.stack([torch.linalg.vector_norm(gradient.double()) for gradient in gradients])
    norms, is_finite = run(kind, make_launcher(seed), gradients)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)
    assert is_finite.tolist() == [1] * len(sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_the_task_with_nan_is_flagged(make_launcher: MakeLauncher, kind: str, value: float) -> None:
    healthy = [draw(700, 0), draw(300, 1), draw(70000, 2)]
    sick = [healthy[0], healthy[1].clone().index_fill_(0, torch.tensor(299), value), healthy[2]]
    before, _ = run(kind, make_launcher(0), healthy)
    norms, is_finite = run(kind, make_launcher(0), sick)
    assert is_finite.tolist() == [1, 0, 1] and not norms[1].isfinite()
    assert torch.equal(norms[[0, 2]], before[[0, 2]])


def test_neither_neighbours_nor_the_order_of_threads_change_a_bit(make_launcher: MakeLauncher) -> None:
    mine, others = draw(200001, 9), [draw(size, size) for size in (10, 70000, 128)]
    orders = [[mine], [*others, mine], [mine, others[1]], [others[0], mine, others[2]]]
    alone, *beside = [
        run("kernel", make_launcher(seed), gradients)[0][next(i for i, g in enumerate(gradients) if g is mine)]
        for seed, gradients in enumerate(orders)
    ]
    assert all(torch.equal(alone, other) for other in beside)


def test_no_tasks_have_no_norms() -> None:
    norms, is_finite = entry.multi_grad_norm([])
    assert norms.shape == is_finite.shape == (0,)


@pytest.mark.parametrize(
    ("gradient", "words"), [(torch.zeros(3).double(), "float64"), (torch.zeros(6)[::2], "contiguous")]
)
def test_arguments_that_do_not_fit_are_refused(gradient: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        entry.multi_grad_norm([torch.zeros(2), gradient])
