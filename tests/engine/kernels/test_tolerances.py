"""Tests the tolerance for floats against a simulation of tensor cores, which cut off where this CPU rounds."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.kernels.grouped_gemm_device import SPLIT_DEPTH
from tests.engine.kernels import tolerances

Floats = NDArray[np.floating]


def as_tf32(values: Floats) -> Floats:
    """Round to 10 bits of mantissa, half up in magnitude, as cvt.rna.tf32 does."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def cut_off(values: Floats) -> Floats:
    """Cut doubles to the 24 bits of a float, towards zero."""
    floats = values.astype(np.float32)
    is_above = np.abs(floats.astype(np.float64)) > np.abs(values)
    return np.where(is_above, np.nextafter(floats, np.float32(0)), floats).astype(np.float64)


def dot_on_tensor_cores(a: Floats, b: Floats, terms_at_once: int) -> Floats:
    """Sum over the last dimension as cuda/tile.cuh does: each float as two tf32, three products, steps of 8."""
    a_high, b_high = as_tf32(a), as_tf32(b)
    a_low, b_low = as_tf32(a - a_high), as_tf32(b - b_high)
    total = np.zeros(len(a))
    for start in range(0, a.shape[1], 8):
        for x, y in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
            terms = x[:, start : start + 8].astype(np.float64) * y[:, start : start + 8]
            for first in range(0, 8, terms_at_once):
                total = cut_off(total + terms[:, first : first + terms_at_once].sum(1))
    return total


@pytest.mark.parametrize("terms_at_once", [4, 8])
def test_floats_on_tensor_cores_are_within_the_tolerance(terms_at_once: int) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 20_000, SPLIT_DEPTH)).astype(np.float32)
    terms = a.astype(np.float64) * b
    errors = np.abs(dot_on_tensor_cores(a, b, terms_at_once) - terms.sum(1)) / np.abs(terms).sum(1)
    worst = errors.max()
    assert tolerances.PRODUCTS[torch.float32] < worst < tolerances.of_products(torch.float32, torch.device("cuda"))
