"""When a device has no memory left, in one word for the ways in which CUDA, its libraries and the CPU say it."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class OutOfMemoryError(Exception):
    """A device has no room for what was tried. Its text is what was asked for."""


def within_memory(work: Callable[[], T]) -> T:
    """What it answers. Raises NoMemory without the frames that failed: those would hold on to their tensors."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = in_short(error)
    raise OutOfMemoryError(asked)


def with_second_try(work: Callable[[], T], release: Callable[[], None]) -> T:
    """`within_memory`; where there is none, once more when `release` has given back what is kept for later."""
    with suppress(OutOfMemoryError):
        return within_memory(work)
    release()
    return within_memory(work)


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def in_short(error: Exception) -> str:
    """What was asked for, in the allocator's words if it says so."""
    found = re.search(r"[Tt]ried to allocate [0-9.]+ \w+", str(error))
    return found[0] if found else type(error).__name__


def release_cache(device_kind: str) -> None:
    """Gives back what an allocator keeps for later: the next try is smaller, and needs it in other pieces."""
    if device_kind == "cuda":
        torch.cuda.empty_cache()
