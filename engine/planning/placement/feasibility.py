"""Refuses a task that no executor could ever hold, and names the smallest change of the task after which one could."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from engine.errors import InvalidInputError, WillNeverFitError
from engine.planning.cost.memory_model import microbatch_tokens, total_bytes
from engine.planning.types import ExecutorView, PlannerConfig
from engine.task import TaskSpec


def refuse_if_never_fits(spec: TaskSpec, executors: Iterable[ExecutorView], config: PlannerConfig) -> None:
    """Raise WillNeverFitError, with bytes and a remedy, if no executor could hold the task even without neighbours."""
    candidates = [executor for executor in executors if executor.backbone.name == spec.backbone]
    if not candidates or _fits(spec, candidates, config):
        return
    most = max(executor.memory_bytes for executor in candidates)
    field, remedy = _remedy(spec, candidates, config)
    raise WillNeverFitError.of_field(
        field,
        f"needs {format_bytes(_least_bytes(spec, candidates, config))}, the executors of this backbone have at most "
        f"{format_bytes(most)}. {remedy}",
    )


def format_bytes(num_bytes: float) -> str:
    """Format as 18.2 GB, or as 45.1 MB below a tenth of a GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _remedy(spec: TaskSpec, executors: Sequence[ExecutorView], config: PlannerConfig) -> tuple[str, str]:
    """Return the field to change and the advice: the first change that helps, with the largest value that fits.

    Each change is tried alone, then together with a micro batch of 1.
    """
    one_each = replace(spec, training=replace(spec.training, micro_batch_size=1))
    for start, also in ((spec, ""), (one_each, "micro batch to 1 and ")):
        for change in _changes(start):
            value = _largest(change.value, partial(_fits_changed, change, executors, config))
            if value:
                needed = format_bytes(_least_bytes(change.to(value), executors, config))
                return change.field, f"Reduce {also}{change.words} to {value} (needs {needed})."
    budget = _largest(config.token_budget, lambda tokens: _fits(spec, executors, replace(config, token_budget=tokens)))
    smaller = f"microbatches of {budget} tokens or " if budget else ""
    return "spec.backbone", f"No change of the task alone helps: ask its operator for {smaller}a larger executor."


@dataclass(frozen=True)
class _Change:
    """A number of the task that could be smaller: its field, its name in words, its value, the task with another."""

    field: str
    words: str
    value: int
    to: Callable[[int], TaskSpec]


def _changes(spec: TaskSpec) -> Iterator[_Change]:
    """Yield possible changes. First those that keep the result, then changes of the data, then of the adapter."""
    training, method = spec.training, spec.method
    yield _Change("spec.training.micro_batch_size", "micro batch", training.micro_batch_size,
                  lambda value: replace(spec, training=replace(training, micro_batch_size=value)))  # fmt: skip
    yield _Change("spec.training.max_sequence_tokens", "max_sequence_tokens", training.max_sequence_tokens,
                  lambda value: replace(spec, training=replace(training, max_sequence_tokens=value)))  # fmt: skip
    if size := method.size_field:
        yield _Change(f"spec.{method.name}.{size}", size, getattr(method, size),
                      lambda value: replace(spec, method=replace(cast(Any, method), **{size: value})))  # fmt: skip


def _fits_changed(change: _Change, executors: Sequence[ExecutorView], config: PlannerConfig, value: int) -> bool:
    return _fits(change.to(value), executors, config)


def _largest(value: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number below `value` that fits, by bisection; 0 if none does."""
    low, high = 0, value
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(spec: TaskSpec, executors: Sequence[ExecutorView], config: PlannerConfig) -> bool:
    try:
        return any(_bytes(spec, executor, config) <= executor.memory_bytes for executor in executors)
    except InvalidInputError:  # a value that the method does not accept
        return False


def _least_bytes(spec: TaskSpec, executors: Sequence[ExecutorView], config: PlannerConfig) -> int:
    return min(_bytes(spec, executor, config) for executor in executors)


def _bytes(spec: TaskSpec, executor: ExecutorView, config: PlannerConfig) -> int:
    tokens = microbatch_tokens([spec], config.token_budget, config.largest_chunk_tokens)
    return total_bytes([spec], executor.backbone, tokens)
