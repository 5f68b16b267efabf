"""Gradient of a task, which occupies memory on a CPU only during a step.

Its address stays the same: the parameters' gradients are views of it. Legend: P parameters of the task.
"""

import mmap
from contextlib import suppress

import torch

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14 and later, which Python's mmap does not name
_HUGE_PAGE_BYTES = 2 << 20


class GradientBuffer:
    """The gradient `values_P`, [P] float32, zero at first. Raises MemoryError, or torch's error, if memory is short."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._pages = _pages(size * torch.float32.itemsize) if device.type == "cpu" and size else None
        self._is_allocated = False
        if self._pages is None:
            self.values_P = torch.zeros(size, device=device)
        else:
            self.values_P = torch.frombuffer(self._pages, dtype=torch.float32)

    def allocate(self) -> None:
        """Allocates all pages at once, before backward writes to them: else each page costs a fault of microseconds."""
        if self._pages is not None and not self._is_allocated:
            with suppress(OSError):  # an older system, or no memory: each page is then allocated when it is written to
                self._pages.madvise(_POPULATE_WRITE)
            self._is_allocated = True

    def clear(self) -> None:
        """Sets the gradient to zero."""
        if self._pages is None:
            self.values_P.zero_()
        self.release()

    def release(self) -> None:
        """Releases the pages of a gradient that is zero or may become zero.

        New pages, which are zero, are allocated by `allocate` or when they are written to.
        """
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)
            self._is_allocated = False


def _pages(num_bytes: int) -> mmap.mmap:
    """Returns pages of zeros that occupy no memory before they are written to."""
    try:
        pages = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for a gradient of {num_bytes} bytes: {error}") from error
    if num_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # the kernel has no huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
