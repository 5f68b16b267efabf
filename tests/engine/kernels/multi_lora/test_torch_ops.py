"""Tests the operators that a backbone on CUDA uses, on this CPU: their autograd against the reference's."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from engine.kernels import cupy_launcher
from engine.kernels.dropout import DropoutMask, keep_scale
from engine.kernels.multi_lora import dispatch, torch_ops
from engine.kernels.multi_lora.descriptors import describe_factors, describe_uses, group_uses
from engine.kernels.multi_lora.types import AdapterSlice, LowRank, Operator
from tests.engine.kernels.conftest import MakeLauncher

WIDTH_IN, WIDTHS_OUT, TOKENS = 40, (24, 16, 8), 90


@pytest.fixture(autouse=True)
def where(make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Create all tensors of a test on the launcher's device."""
    launcher = make_launcher(0)
    monkeypatch.setattr(cupy_launcher, "launcher_of", lambda _: launcher)
    with launcher.device:
        yield


def here() -> torch.device:
    return torch.get_default_device()


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size) + seed), device="cpu").to(here())


def mask(length: int) -> DropoutMask:
    return DropoutMask(4, 1, 2, np.arange(length), WIDTH_IN, 0.25, here())


def uses(dropout: bool = True) -> list[AdapterSlice]:
    second = AdapterSlice(40, 72, 2.0, mask(32), keep_scale(0.25)) if dropout else AdapterSlice(40, 72, 2.0)
    return [AdapterSlice(2, 33, 0.5), second, AdapterSlice(72, 90, 1.0)]


def factors(width_out: int) -> list[LowRank]:
    """Return factors of LoRA, of VeRA (A is a frozen slice, with gains), and of MiSS (B is transposed)."""
    wide = draw(5, WIDTH_IN + 3)
    low_ranks = [
        LowRank(draw(4, WIDTH_IN), draw(width_out, 4)),
        LowRank(wide[:, :WIDTH_IN], draw(width_out, 5), draw(5), draw(width_out, seed=1)),
        LowRank(draw(3, WIDTH_IN), draw(3, width_out, seed=2).T),
    ]
    for factor in (*low_ranks[0], *low_ranks[1][2:], low_ranks[2].b_NR):
        if factor is not None:
            factor.requires_grad_()
    return low_ranks


def group(with_bias: bool = False, dropout: bool = True) -> list[Operator]:
    """Return three operators: with all uses, with two, and with none."""
    chosen = ([0, 1, 2], [1, 2], [])
    return [
        Operator(
            draw(WIDTH_IN, n),
            draw(n) if with_bias else None,
            [uses(dropout)[i] for i in which],
            [factors(n)[i] for i in which],
        )
        for n, which in zip(WIDTHS_OUT, chosen, strict=True)
    ]


def trained(operators: Sequence[Operator]) -> list[torch.Tensor]:
    return [f for o in operators for low_rank in o.factors for f in low_rank if f is not None and f.requires_grad]


def reference(x: torch.Tensor, operators: Sequence[Operator]) -> tuple[torch.Tensor, ...]:
    """Compute by the torch path, also for tensors on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_on_device", lambda *_: False)
        return dispatch.multi_lora(x, operators)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("writes_first", [True, False])
def test_autograd_equals_the_references(
    with_bias: bool, needs_dx: bool, writes_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ops, "accumulates_into_base_gemm", lambda *_: writes_first)
    actual, expected = [], []
    for entry, results in ((torch_ops.run, actual), (reference, expected)):
        x, operators = draw(TOKENS, WIDTH_IN).requires_grad_(needs_dx), group(with_bias)
        ys = entry(x, operators)
        leaves = [*([x] if needs_dx else []), *trained(operators)]
        loss = sum((y * draw(*y.shape, seed=3)).sum() for y in ys)
        results += [*(y.detach() for y in ys), *torch.autograd.grad(loss, leaves)]
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_an_unused_result_has_a_zero_gradient() -> None:
    actual, expected = [], []
    for entry, results in ((torch_ops.run, actual), (reference, expected)):
        x, operators = draw(TOKENS, WIDTH_IN).requires_grad_(), group()
        loss = (entry(x, operators)[1] * draw(TOKENS, WIDTHS_OUT[1], seed=3)).sum()
        results += torch.autograd.grad(loss, [x, *trained(operators[1:])])
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_a_group_without_uses_is_the_frozen_operators() -> None:
    x, operators = draw(TOKENS, WIDTH_IN).requires_grad_(), [o._replace(uses=[], factors=[]) for o in group(True)]
    ys = torch_ops.run(x, operators)
    plain = [x @ o.weight_KN + o.bias_N for o in operators]
    torch.testing.assert_close(ys, tuple(plain))
    actual, expected = (torch.autograd.grad(sum(y.square().sum() for y in of), x) for of in (ys, plain))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_factors_in_another_type_are_cast_and_their_gradients_cast_back() -> None:
    x, weight = draw(TOKENS, WIDTH_IN).bfloat16(), draw(WIDTH_IN, 24).bfloat16()
    low_rank = LowRank(draw(4, WIDTH_IN).bfloat16().requires_grad_(), draw(24, 4).double().requires_grad_())
    [y] = torch_ops.run(x, [Operator(weight, None, [AdapterSlice(0, 50, 1.0)], [low_rank])])
    y.sum().backward()
    assert low_rank.a_RK.grad is not None and low_rank.a_RK.grad.dtype == torch.bfloat16
    assert low_rank.b_NR.grad is not None and low_rank.b_NR.grad.dtype == torch.float64


def test_x_is_saved_only_if_an_a_is_trained() -> None:
    x, weight = draw(TOKENS, WIDTH_IN).requires_grad_(), draw(WIDTH_IN, 24)
    for trains_a in (True, False):
        low_rank = LowRank(draw(4, WIDTH_IN).requires_grad_(trains_a), draw(24, 4).requires_grad_())
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
        ):
            torch_ops.run(x, [Operator(weight, None, [AdapterSlice(0, 50, 1.0)], [low_rank])])
        assert (x.data_ptr() in saved) == trains_a


def test_a_step_that_is_updated_in_place_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph could not follow an upload: with a known layout, a new step only changes a value in memory."""
    cell, operators = torch.tensor(1, device=here()), group()
    positions = np.arange(32)

    def at(step: int) -> list[Operator]:
        dropout = DropoutMask(4, step, 2, positions, WIDTH_IN, 0.25, here(), cell)
        changed = [
            AdapterSlice(40, 72, 2.0, dropout, keep_scale(0.25)) if u.start == 40 else u for u in operators[0].uses
        ]
        return [operators[0]._replace(uses=changed)]

    x = draw(TOKENS, WIDTH_IN)
    first = torch_ops.run(x, at(1))
    monkeypatch.setattr(cupy_launcher.launcher_of(here()), "upload", None)
    cell.fill_(7)
    second = torch_ops.run(x, at(7))
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(second, reference(x, at(7)), rtol=2e-5, atol=2e-5)


def test_a_backward_pass_at_another_step_than_its_forward_pass_is_refused() -> None:
    cell, [first, *_] = torch.tensor(1, device=here()), group()
    dropout = DropoutMask(4, 1, 2, np.arange(32), WIDTH_IN, 0.25, here(), cell)
    uses = [AdapterSlice(40, 72, 2.0, dropout, keep_scale(0.25)) if use.start == 40 else use for use in first.uses]
    [y] = torch_ops.run(draw(TOKENS, WIDTH_IN), [first._replace(uses=uses)])
    cell.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_torch_accepts_the_operators() -> None:
    operators = group(dropout=False)
    pairs = group_uses(operators)
    rows = [describe_factors(pairs), describe_uses(pairs, WIDTH_IN, WIDTHS_OUT)]
    raw = [torch.from_numpy(np.frombuffer(each.tobytes(), np.uint8).copy()).cpu() for each in rows]
    flat = [f.detach().clone().requires_grad_() for pair in pairs for f in pair.low_rank if f is not None]
    arguments = (
        draw(TOKENS, WIDTH_IN).requires_grad_(),
        [operator.weight_KN for operator in operators],
        [None, draw(WIDTHS_OUT[1]), None],
        flat,
        [],
        *raw,
        None,
    )
    torch.library.opcheck(
        torch_ops.multi_lora_op, arguments, test_utils=("test_faketensor", "test_autograd_registration")
    )


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    x, [first, *_] = draw(TOKENS, WIDTH_IN), group()
    with pytest.raises(ValueError, match="weight_KN is"):
        torch_ops.run(x, [first._replace(weight_KN=first.weight_KN.double())])
    with pytest.raises(ValueError, match="on meta"):
        elsewhere = LowRank(first.factors[2].a_RK.to("meta"), first.factors[2].b_NR)
        torch_ops.run(x, [first._replace(factors=[*first.factors[:2], elsewhere])])
    with pytest.raises(ValueError, match="do not fit"):
        torch_ops.run(x, [first._replace(factors=factors(WIDTHS_OUT[1]))])
    with pytest.raises(ValueError, match="overlaps"):
        torch_ops.run(x, [first, first._replace(uses=[AdapterSlice(3, 20, 1.0)], factors=first.factors[:1])])
