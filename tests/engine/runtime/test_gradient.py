"""A gradient that is given back is zero again, in the same place."""

import torch

from engine.runtime.gradient import Gradient


def test_what_is_given_back_is_zero_and_can_be_written_to_again() -> None:
    gradient = Gradient(3_000_001, torch.device("cpu"))
    values_P, address = gradient.values_P, gradient.values_P.data_ptr()
    for give in (gradient.give_back, gradient.clear):
        assert not values_P.any()
        values_P.fill_(7.0)
        give()
    assert not values_P.any() and values_P.data_ptr() == address


def test_a_task_without_parameters_has_an_empty_one() -> None:
    gradient = Gradient(0, torch.device("cpu"))
    gradient.clear()
    assert gradient.values_P.shape == (0,)
