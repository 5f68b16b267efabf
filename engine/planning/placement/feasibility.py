"""Whether any executor could ever hold a task, and if none can, the least change of the task after which one could."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from engine.errors import InvalidInputError, WillNeverFitError
from engine.planning.cost.memory_model import microbatch_tokens, total_bytes
from engine.planning.types import ExecutorView, PlannerConfig
from engine.task import TaskSpec


def refuse_if_never_fits(spec: TaskSpec, executors: Iterable[ExecutorView], limits: PlannerConfig) -> None:
    """Raises WillNeverFitError, with the bytes and a remedy, if no executor could hold the task even alone."""
    known = [executor for executor in executors if executor.backbone.name == spec.backbone]
    if not known or _fits(spec, known, limits):
        return
    most = max(executor.memory_bytes for executor in known)
    field, remedy = _remedy(spec, known, limits)
    raise WillNeverFitError.of_field(
        field,
        f"needs {told(_needed(spec, known, limits))}, the executors of this backbone have at most {told(most)}: "
        f"{remedy}",
    )


def told(num_bytes: float) -> str:
    """18.2 GB; below a tenth of one, 45.1 MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _remedy(spec: TaskSpec, executors: Sequence[ExecutorView], limits: PlannerConfig) -> tuple[str, str]:
    """The field to change, and to what: the first that helps, alone or with a micro batch of 1, at the largest value
    that fits."""
    one_each = replace(spec, training=replace(spec.training, micro_batch_size=1))
    for start, beside in ((spec, ""), (one_each, "micro batch to 1 and ")):
        for change in _changes(start):
            value = _largest(change.value, partial(_fits_changed, change, executors, limits))
            if value:
                needed = told(_needed(change.to(value), executors, limits))
                return change.field, f"reduce {beside}{change.words} to {value} ({needed})"
    budget = _largest(limits.token_budget, lambda tokens: _fits(spec, executors, replace(limits, token_budget=tokens)))
    smaller = f"microbatches of {budget} tokens, or " if budget else ""
    return "spec.backbone", f"no change of the task alone helps, ask its operator for {smaller}a larger executor"


@dataclass(frozen=True)
class _Change:
    """A number of the task's that could be less: its field, its name in words, and the task with another."""

    field: str
    words: str
    value: int
    to: Callable[[int], TaskSpec]


def _changes(spec: TaskSpec) -> Iterator[_Change]:
    """What a tenant would rather change comes first: what changes no result, then the data, then the adapter."""
    training, method = spec.training, spec.method
    yield _Change("spec.training.micro_batch_size", "micro batch", training.micro_batch_size,
                  lambda value: replace(spec, training=replace(training, micro_batch_size=value)))  # fmt: skip
    yield _Change("spec.training.max_sequence_tokens", "max_sequence_tokens", training.max_sequence_tokens,
                  lambda value: replace(spec, training=replace(training, max_sequence_tokens=value)))  # fmt: skip
    if size := method.size_field:
        yield _Change(f"spec.{method.name}.{size}", size, getattr(method, size),
                      lambda value: replace(spec, method=replace(cast(Any, method), **{size: value})))  # fmt: skip


def _fits_changed(change: _Change, executors: Sequence[ExecutorView], limits: PlannerConfig, value: int) -> bool:
    return _fits(change.to(value), executors, limits)


def _largest(value: int, fits: Callable[[int], bool]) -> int:
    """Below `value`, by bisection; 0 if none fits."""
    low, high = 0, value
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(spec: TaskSpec, executors: Sequence[ExecutorView], limits: PlannerConfig) -> bool:
    try:
        return any(_bytes(spec, executor, limits) <= executor.memory_bytes for executor in executors)
    except InvalidInputError:  # a value that its method does not take
        return False


def _needed(spec: TaskSpec, executors: Sequence[ExecutorView], limits: PlannerConfig) -> int:
    return min(_bytes(spec, executor, limits) for executor in executors)


def _bytes(spec: TaskSpec, executor: ExecutorView, limits: PlannerConfig) -> int:
    tokens = microbatch_tokens([spec], limits.token_budget, limits.largest_chunk_tokens)
    return total_bytes([spec], executor.backbone, tokens)
