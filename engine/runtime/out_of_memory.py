"""Detects the out-of-memory errors of CUDA, its libraries and the CPU, and raises one class for all of them."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")
_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class OutOfMemoryError(Exception):
    """The device has too little memory for an allocation. The text names the allocation."""


def within_memory(work: Callable[[], T]) -> T:
    """Returns the result of `work`.

    Raises OutOfMemoryError without the frames that failed, which would keep their tensors alive.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        allocation = summary(error)
    raise OutOfMemoryError(allocation)


def retry_after_release(work: Callable[[], T], release: Callable[[], None]) -> T:
    """Runs `work` within memory; if memory is short, once more after `release`."""
    with suppress(OutOfMemoryError):
        return within_memory(work)
    release()
    return within_memory(work)


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def summary(error: Exception) -> str:
    """Returns the allocation that failed as the allocator describes it, or the error's type."""
    match = re.search(r"[Tt]ried to allocate [0-9.]+ \w+", str(error))
    return match[0] if match else type(error).__name__


def release_cache(device_kind: str) -> None:
    """Releases the memory that the allocator caches: the next attempt needs pieces of other sizes."""
    if device_kind == "cuda":
        torch.cuda.empty_cache()
