"""Kernels on a GPU: cubins loaded and launched by CuPy, on torch's current stream, with torch's memory.

CuPy is imported where the first kernel is launched: an installation without a GPU does not have it. It checks nothing
of what it passes on; the entries do.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from engine.kernels.compile import cubin
from engine.kernels.launch import THREADS, Kernel, Launcher, Table, Tables

_SHARED_BYTES_WITHOUT_ASKING = 48 << 10


@functools.cache
def launcher_of(device: torch.device) -> Launcher:
    """The launcher of a CUDA device; `device` has an index."""
    return CupyLauncher(device)


class CupyLauncher(Tables):
    """Launches on one device. A kernel is loaded at its first launch: before a graph is captured, run once."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        properties = torch.cuda.get_device_properties(device)
        self.num_multiprocessors = properties.multi_processor_count
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self._modules: dict[str, Any] = {}
        self._functions: dict[Kernel, Any] = {}
        self._shared_bytes: dict[Kernel, int] = {}

    @property
    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def launch(
        self,
        kernel: Kernel,
        num_blocks: int,
        shared_bytes: int,
        struct: NDArray[Any],
        tables: Sequence[Table],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """What the struct points into is torch's memory of this stream: its allocator keeps the order, not we."""
        import cupy

        with torch.cuda.device(self.device):
            function = self._function(kernel, shared_bytes)
            stream = torch.cuda.current_stream(self.device).cuda_stream  # asked for each time: a capture has its own
            with cupy.cuda.ExternalStream(stream, self.device.index):
                function((num_blocks,), (THREADS,), (struct,), shared_mem=shared_bytes)

    def _function(self, kernel: Kernel, shared_bytes: int) -> Any:
        """Loaded once, and allowed as much shared memory as it has been asked for with."""
        if kernel not in self._functions:
            import cupy

            if kernel.source not in self._modules:
                path = cubin(kernel.source, self.architecture)
                self._modules[kernel.source] = cupy.RawModule(path=str(path))
            self._functions[kernel] = self._modules[kernel.source].get_function(kernel.name)
            self._shared_bytes[kernel] = _SHARED_BYTES_WITHOUT_ASKING
        if shared_bytes > self._shared_bytes[kernel]:
            self._functions[kernel].max_dynamic_shared_size_bytes = shared_bytes
            self._shared_bytes[kernel] = shared_bytes
        return self._functions[kernel]
