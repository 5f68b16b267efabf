"""Tests packed weights against float64: any shape, any rows, any layout of the operands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.multi_lora.dispatch import multi_lora
from engine.kernels.multi_lora.types import AdapterSlice, LowRank, Operator
from engine.kernels.packed_weight import PackedWeight
from tests.thoroughness import examples

pytestmark = pytest.mark.skipif(PackedWeight.of(torch.ones(2, 2)) is None, reason="this CPU is not packed for")
SIZES, ROOT = st.integers(1, 200), Path(__file__).parents[3]


def packed(weight_KN: torch.Tensor) -> PackedWeight:
    weight = PackedWeight.of(weight_KN)
    assert weight is not None
    return weight


def near(product: torch.Tensor, exact: torch.Tensor) -> bool:
    """The tolerance is that of float32 in sums of up to 200 products of numbers near 1."""
    return product.dtype == torch.float32 and torch.allclose(product.double(), exact, rtol=1e-5, atol=1e-4)


@settings(max_examples=examples(60), deadline=None)
@given(num_tokens=st.integers(0, 300), num_in=SIZES, num_out=SIZES, seed=st.integers(0, 9), has_bias=st.booleans(),
       is_transposed=st.booleans(), is_strided=st.booleans())  # fmt: skip
def test_products_are_those_of_the_plain_weight(
    num_tokens: int, num_in: int, num_out: int, seed: int, has_bias: bool, is_transposed: bool, is_strided: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=generator) for s in ((num_in, num_out), (num_out, num_in), (num_out,))]
    weight_KN, bias_N = drawn[1].T if is_transposed else drawn[0], drawn[2] if has_bias else None
    wide = 2 if is_strided else 1
    x_TK = torch.randn(num_tokens, wide * num_in, generator=generator)[:, ::wide]
    dy_TN = torch.randn(num_tokens, wide * num_out, generator=generator)[:, ::wide]
    dx_TK, weight = torch.randn(num_tokens, num_in, generator=generator), packed(weight_KN)
    y_TN = x_TK.double() @ weight_KN.double() + (0 if bias_N is None else bias_N.double())
    gradient_TK = dy_TN.double() @ weight_KN.double().T
    assert near(weight.times(x_TK, bias_N), y_TN)
    assert near(weight.gradient(dy_TN), gradient_TK)
    both_TK = dx_TK.double() + gradient_TK
    assert weight.gradient(dy_TN, dx_TK) is dx_TK
    assert near(dx_TK, both_TK)


def test_it_may_be_written_to_afterwards_without_effect() -> None:
    weight_KN, x_TK = torch.randn(40, 50), torch.randn(6, 40)
    weight, expected = packed(weight_KN), x_TK.double() @ weight_KN.double()
    weight_KN.zero_()
    assert near(weight.times(x_TK, None), expected)


def test_its_bytes_are_at_least_two_weights() -> None:
    assert 2 * 4 * 256 * 512 <= packed(torch.randn(256, 512)).nbytes < 2 * 4 * 256 * 512 * 1.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_not_packed(dtype: torch.dtype) -> None:
    assert PackedWeight.of(torch.ones(4, 4, dtype=dtype)) is None


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights_are_not_packed(shape: tuple[int, int]) -> None:
    assert PackedWeight.of(torch.ones(shape)) is None


def test_a_group_of_operators_trains_alike_with_and_without() -> None:
    """Compares values and all gradients, also of an operator without adapters and of one with an unused result."""
    torch.manual_seed(0)
    weights, bias_N = [torch.randn(48, n) for n in (64, 64, 32)], torch.randn(64)
    factors = [torch.randn(8, 48, requires_grad=True), torch.randn(64, 8, requires_grad=True)]
    x_TK, low_rank = torch.randn(70, 48, requires_grad=True), LowRank(*factors)
    results = []
    for packs in (False, True):
        uses = (
            ([AdapterSlice(5, 30, 0.5), AdapterSlice(30, 70, 2.0)], [low_rank, low_rank]),
            ([AdapterSlice(5, 30, 1.0)], [low_rank]),
            ([], []),
        )
        operators = [
            Operator(w, b, *use, PackedWeight.of(w) if packs else None)
            for w, b, use in zip(weights, (bias_N, None, None), uses, strict=True)
        ]
        first, _, third = multi_lora(x_TK, operators)
        gradients = torch.autograd.grad(first.square().mean() + third.sin().mean(), [x_TK, *factors])
        results.append([first, third, *gradients])
    assert [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True)] == [True] * 5


MANY_ROWS = """
import random, torch
from pathlib import Path
from engine.kernels.packed_weight import PackedWeight
from tests.thoroughness import examples
from tests.thoroughness import examples

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) << 12

own, x_TK, rows = PackedWeight.of(torch.ones(64, 64)), torch.ones(1000, 64), list(range(1, 1001))
random.Random(0).shuffle(rows)
for num_rows in rows[:100]:
    own.times(x_TK[:num_rows], None)
before = resident()
for num_rows in rows[100:]:
    own.times(x_TK[:num_rows], None)
print(resident() - before)
"""


def test_every_number_of_rows_does_not_leave_its_code_behind() -> None:
    """oneDNN caches about 0.6 MB of compiled code for each, by default 1,024 of them: half a gigabyte."""
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    command = [sys.executable, "-c", MANY_ROWS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert int(done.stdout) < 50e6
