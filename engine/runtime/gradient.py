"""A task's gradient, which takes memory on a CPU only while a step is in flight.

Its address stays: views of it are the parameters' gradients. Legend: P parameters of the task.
"""

import mmap

import torch


class Gradient:
    """`values_P`: [P], zero at first, float32. Raises MemoryError, or what torch raises, where there is no room."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._pages = _pages(size * torch.float32.itemsize) if device.type == "cpu" and size else None
        if self._pages is None:
            self.values_P = torch.zeros(size, device=device)
        else:
            self.values_P = torch.frombuffer(self._pages, dtype=torch.float32)

    def clear(self) -> None:
        """Makes it zero."""
        if self._pages is None:
            self.values_P.zero_()
        self.give_back()

    def give_back(self) -> None:
        """Of one that is zero or is to be: its pages, where it has its own. They come anew as they are written to."""
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)


def _pages(num_bytes: int) -> mmap.mmap:
    """Zero, in no memory before they are written to."""
    try:
        return mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of a gradient: {error}") from error
