"""A task's gradient, which takes memory on a CPU only while a step is in flight.

Its address stays: views of it are the parameters' gradients. Legend: P parameters of the task.
"""

import mmap
from contextlib import suppress

import torch

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14 and later, which Python's mmap does not name
_HUGE_PAGE_BYTES = 2 << 20


class GradientBuffer:
    """`values_P`: [P], zero at first, float32. Raises MemoryError, or what torch raises, where there is no room."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._pages = _pages(size * torch.float32.itemsize) if device.type == "cpu" and size else None
        self._is_held = False
        if self._pages is None:
            self.values_P = torch.zeros(size, device=device)
        else:
            self.values_P = torch.frombuffer(self._pages, dtype=torch.float32)

    def take(self) -> None:
        """Its pages at once, before backward writes to them: one at a time each costs a fault, of microseconds."""
        if self._pages is not None and not self._is_held:
            with suppress(OSError):  # an older system, or no room: then they come, or fail, as they are written to
                self._pages.madvise(_POPULATE_WRITE)
            self._is_held = True

    def clear(self) -> None:
        """Makes it zero."""
        if self._pages is None:
            self.values_P.zero_()
        self.give_back()

    def give_back(self) -> None:
        """Of one that is zero or is to be: its pages, where it has its own. They come anew, zero, as `take` asks for
        them, or as they are written to."""
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)
            self._is_held = False


def _pages(num_bytes: int) -> mmap.mmap:
    """Zero, in no memory before they are written to."""
    try:
        pages = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of a gradient: {error}") from error
    if num_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
