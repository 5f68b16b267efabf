"""A gradient that was released is zero again, at the same address."""

import mmap
import resource

import pytest
import torch

from engine.runtime.gradient_buffer import GradientBuffer


def test_a_released_gradient_is_zero_and_can_be_written_again() -> None:
    gradient = GradientBuffer(3_000_001, torch.device("cpu"))
    values_P, address = gradient.values_P, gradient.values_P.data_ptr()
    for give in (gradient.release, gradient.clear):
        gradient.allocate()
        assert not values_P.any()
        values_P.fill_(7.0)
        gradient.allocate()  # its values stay
        assert (values_P == 7.0).all()
        give()
    assert not values_P.any() and values_P.data_ptr() == address


def test_a_task_without_parameters_has_an_empty_gradient() -> None:
    gradient = GradientBuffer(0, torch.device("cpu"))
    gradient.allocate()
    gradient.clear()
    assert gradient.values_P.shape == (0,)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="no page faults to count")
def test_an_allocated_gradient_is_written_without_a_fault_for_each_page() -> None:
    gradient = GradientBuffer(3_000_001, torch.device("cpu"))
    gradient.allocate()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    gradient.values_P[::1024].fill_(1.0)  # one float of each page: too few for a second thread
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 100
