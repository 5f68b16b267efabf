"""Divides the time of a torch profile among the parts of a training step.

Modules and functions are wrapped in ranges while the profiler runs (`in_ranges`). An operator belongs to the innermost
range around it; an operator of backward to the range of the forward operator with the same autograd sequence number.
In any range, a product with a frozen weight is a frozen GEMM: it is recognised by the shape of its second matrix. (In
the gradient of A, a task's tokens would be mistaken for a weight if there were as many as a weight has rows.) Products
with packed weights are frozen GEMMs too.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.profiler import record_function

from benchmarks import systems
from engine.peft.mounted import MountedLinear
from engine.runtime import executor

FROZEN, ADAPTERS, ATTENTION = "frozen GEMMs", "adapters", "attention"
ELEMENTWISE, LOSS, OPTIMIZER = "norms and elementwise", "cross entropy", "clip and optimizer"
COPIES, OTHER, IDLE = "copies", "other operators", "between operators"
GROUPS = (FROZEN, ADAPTERS, ATTENTION, ELEMENTWISE, LOSS, OPTIMIZER, COPIES, OTHER, IDLE)
_PREFIX = "part of a step: "
_BACKWARD = "autograd::engine::evaluate_function: "
_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "linear")}
_BY_PACKED = "mkldnn::_linear_pointwise"
_COPIES = {"aten::copy_", "aten::cat"}
Shape = tuple[int, ...]


@contextmanager
def in_ranges(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Wrap the models' modules, and the functions of losses and optimizer steps, in ranges of their groups."""
    functions = (
        (executor, "segment_cross_entropy", LOSS), (executor, "take_steps", OPTIMIZER),
        (systems, "_take_step", OPTIMIZER), (torch.nn.functional, "cross_entropy", LOSS),
    )  # fmt: skip
    open_ranges: list[record_function] = []

    def enter(group: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(_PREFIX + group))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for owner, name, group in functions:
            stack.enter_context(patch.object(owner, name, _in_range(getattr(owner, name), group)))
        for module, group in _grouped(models):
            for handle in (module.register_forward_pre_hook(enter(group)), module.register_forward_hook(leave)):
                stack.callback(handle.remove)
        yield


def _in_range(function: Callable[..., Any], group: str) -> Callable[..., Any]:
    @wraps(function)
    def within(*args: Any, **keywords: Any) -> Any:
        with record_function(_PREFIX + group):
            return function(*args, **keywords)

    return within


def _grouped(models: Iterable[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, str]]:
    """Yield modules with their groups. The rest of a model is norms, activations and residuals: ELEMENTWISE."""
    for model in models:
        yield model, ELEMENTWISE
        for module in model.modules():
            if isinstance(module, MountedLinear | BaseTunerLayer):
                yield module, ADAPTERS
            elif type(module).__name__.endswith("Attention"):
                yield module, ATTENTION


def frozen_shapes(model: torch.nn.Module) -> set[Shape]:
    """Return the shapes of its linear operators' weights, in both orders. Call it before adapters are mounted."""
    weights = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return {shape for weight in weights for shape in (weight, weight[::-1])}


def seconds_by_group(
    events: Collection[Any], whole_seconds: float, frozen: Collection[Shape], is_device: bool
) -> dict[str, float]:
    """Return the seconds of each of GROUPS; their sum is `whole_seconds`. The profile must have shapes.

    On a CPU an operator counts with its self time. If `is_device`, it counts with the kernels that it launched, and
    IDLE is the time in which the device ran no kernel.
    """
    forward = _groups_of_nodes(events)
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        if (event_seconds := _own_seconds(event, is_device)) > 0:
            seconds[_group_of(event, forward, frozen)] += event_seconds
    return seconds | {IDLE: whole_seconds - sum(seconds.values())}


def _own_seconds(event: Any, is_device: bool) -> float:
    if event.device_type != torch.autograd.DeviceType.CPU:
        return 0.0  # a kernel: counted where it was launched
    if is_device:
        return float(event.self_device_time_total) / 1e6
    return float(event.self_cpu_time_total) / 1e6 if event.name.startswith(("aten::", "mkldnn::")) else 0.0


def _groups_of_nodes(events: Iterable[Any]) -> Mapping[int, str]:
    """Return groups by sequence number. The last operator with a number counts: earlier ones created no node."""
    groups = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr is not None and event.sequence_nr >= 0 and (group := _range_of(event)) is not None:
            groups[event.sequence_nr] = group
    return groups


def _range_of(event: Any) -> str | None:
    """Return the group of the innermost range within the same backward node, or None."""
    while event is not None and not event.name.startswith(_BACKWARD):
        if event.name.startswith(_PREFIX):
            return str(event.name.removeprefix(_PREFIX))
        event = event.cpu_parent
    return None


def _group_of(event: Any, forward: Mapping[int, str], frozen: Collection[Shape]) -> str:
    if event.name == _BY_PACKED:
        return FROZEN
    if event.name in _PRODUCTS:
        matrices = [tuple(shape) for shape in event.input_shapes or () if len(shape) == 2]
        if matrices and matrices[-1] in frozen:
            return FROZEN
    if event.name in _COPIES:
        return COPIES
    if (group := _range_of(event)) is not None:
        return group
    while event is not None and not event.name.startswith(_BACKWARD):
        event = event.cpu_parent
    if event is None:
        return OTHER
    if event.name.endswith("AccumulateGrad"):  # of factors: nothing else is trained
        return ADAPTERS
    return forward.get(event.sequence_nr, OTHER)
