"""A fixture of the kernels' tests that fills allocated memory with NaN, so that memory that is not written shows."""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, names in ((torch, ("empty", "empty_like")), (torch.Tensor, ("new_empty",))):
        for name in names:
            allocate = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *a, allocate=allocate, **k: _poison(allocate(*a, **k)))


def _poison(tensor: Any) -> Any:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor
