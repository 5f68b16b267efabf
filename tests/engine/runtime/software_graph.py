"""A CUDA graph in software, as strict as a real one: it records operators and launches with their tensors.

A replay runs them again on the same memory. What the host decided or read during the capture does not change.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.kernels import grouped_gemm, multi_affine
from engine.kernels.launch import LruCache
from engine.kernels.multi_lora import torch_ops
from engine.runtime import attention
from engine.runtime.executor import Executor
from tests.engine.kernels.host.launcher import HostLauncher

READS_BACK = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal"}
_OPS = {
    op._opoverload._schema.name: op._init_fn
    for op in (
        torch_ops.multi_lora_op, torch_ops.multi_lora_backward_op, multi_affine.multi_affine_op,
        multi_affine.multi_affine_backward_op, grouped_gemm.grouped_gemm_op, grouped_gemm.grouped_gemm_backward_op,
    )
}  # fmt: skip


class Tape(TorchDispatchMode):
    """Records operators. `made`: tensors that were created during the recording, in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.created: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name in READS_BACK:
            raise RuntimeError(f"{name} waits for the device, which a capture must not")
        if name in _OPS:  # its operators are recorded, not its call
            with self:
                return _OPS[name](*args, **kwargs)
        result = func(*args, **kwargs)
        argument_storages = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        fresh = [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in argument_storages]
        if func._schema.is_mutable:
            self.steps.append(lambda: func(*args, **kwargs))
        elif fresh and "empty" in name:
            self.steps.append(lambda: poison(fresh))
        elif fresh:
            self.steps.append(lambda: _rewrite(fresh, func(*args, **kwargs)))
        self.created += fresh
        return result


class SoftwareRecording:
    """Implements engine.runtime.cuda_graphs.Recording in software."""

    def __init__(self, executor: Executor, launcher: HostLauncher | None) -> None:
        self._executor, self._launcher = executor, launcher
        self._memory, self._tape = LruCache(None), Tape()
        self._result: torch.Tensor | None = None

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._launcher.using_cache(self._memory) if self._launcher else nullcontext():
            return work()

    def capture(self, work: Callable[[], torch.Tensor]) -> None:
        gradients = [run.gradient_P for run in self._executor.tasks.values()]
        before = [gradient_P.clone() for gradient_P in gradients]
        with self._recorded_launches():
            self._result = self.run(lambda: self._within_tape(work))
        for gradient_P, own_P in zip(gradients, before, strict=True):
            gradient_P.copy_(own_P)  # on a device the capture would not have run anything
        poison(self._tape.created)

    def replay(self) -> torch.Tensor:
        assert self._result is not None
        with torch.no_grad():
            for step in self._tape.steps:
                step()
        return self._result

    def _within_tape(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._tape:
            return work()

    @contextmanager
    def _recorded_launches(self) -> Iterator[None]:
        if self._launcher is None:
            yield
            return
        launcher, launch = self._launcher, self._launcher.launch
        with pytest.MonkeyPatch.context() as patch, launcher.capturing():
            patch.setattr(launcher, "launch", lambda *a: self._tape.steps.append(lambda: launch(*a)))
            yield


def poison(tensors: list[torch.Tensor]) -> None:
    """Fills memory that has not been written yet."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _rewrite(places: list[torch.Tensor], result: Any) -> None:
    for place, value in zip(places, _tensors(result), strict=True):
        place.detach().copy_(value)


def segments_by_bounds(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: tuple[torch.Tensor, int],
    scaling: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Computes `varlen_attention` with bounds that are read from the tensor alone, and nothing beyond the longest
    segment."""
    cu_seqlens_S, longest = bounds
    places_T = torch.arange(query.shape[2])
    segments_T = torch.searchsorted(cu_seqlens_S[1:].contiguous(), places_T.int(), right=True)
    distance_TT = places_T[:, None] - places_T
    allowed_TT = (segments_T[:, None] == segments_T) & (distance_TT >= 0)
    if window is not None:
        allowed_TT = allowed_TT & (distance_TT < window)
    repeated = (heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key, value))
    k, v = (heads[:, :, None].masked_fill(~allowed_TT[:, :, None], 0) for heads in repeated)  # no other segment's NaN
    scores = (query[:, :, :, None] * k).sum(-1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = torch.softmax(scores.masked_fill(~allowed_TT, -torch.inf), dim=-1)
    result = (weights[..., None] * v).sum(-2)
    is_beyond_T = places_T - cu_seqlens_S[segments_T] >= longest
    return result.masked_fill(is_beyond_T[:, None], torch.nan).transpose(1, 2)


@contextmanager
def all_varlen() -> Iterator[None]:
    """Makes attention use the path of flash attention on this CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "fallback_reason", lambda _, *arguments: "not here" if any(arguments) else None)
        patch.setattr(attention, "varlen_attention", segments_by_bounds)
        yield
