"""Launches kernels on a GPU: CuPy loads cubins and launches them on torch's current stream, with torch's memory.

CuPy is imported at the first launch: an installation without a GPU does not have it. It does not check arguments; the
entries do.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from engine.kernels.compile import cubin
from engine.kernels.constants import THREADS
from engine.kernels.launch import CachingUploader, DeviceTable, Kernel, Launcher

_DEFAULT_SHARED_BYTES = 48 << 10  # a kernel may use more if that is set for it


class _StreamAddress(NamedTuple):
    """A stream as a launch of CuPy reads it: an object with its address as `ptr`."""

    ptr: int


@functools.cache
def launcher_of(device: torch.device) -> Launcher:
    """Return the launcher of a CUDA device; `device` has an index."""
    return CupyLauncher(device)


class CupyLauncher(CachingUploader):
    """Launches kernels on one device. A kernel is loaded at its first launch: run once before a graph is captured."""

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
        tables: Sequence[DeviceTable],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """Launch the kernel. torch's allocator orders the reuse of the memory that the struct points into."""
        with torch.cuda.device(self.device):
            function = self.function(kernel, shared_bytes)
            stream = _StreamAddress(self.stream)  # read each time: a capture has its own
            function((num_blocks,), (THREADS,), (struct,), shared_mem=shared_bytes, stream=stream)

    def function(self, kernel: Kernel, shared_bytes: int) -> Any:
        """Return CuPy's kernel, loaded once, with permission for this much shared memory.

        The launcher's device must be torch's current one.
        """
        import cupy

        # Makes the device's context the thread's own: autograd's threads may have none, and torch does not call this
        # for a thread's default device.
        cupy.cuda.runtime.setDevice(self.device.index)
        if kernel not in self._functions:
            if kernel.source not in self._modules:
                path = cubin(kernel.source, self.architecture)
                self._modules[kernel.source] = cupy.RawModule(path=str(path))
            self._functions[kernel] = self._modules[kernel.source].get_function(kernel.name)
            self._shared_bytes[kernel] = _DEFAULT_SHARED_BYTES
        if shared_bytes > self._shared_bytes[kernel]:
            self._functions[kernel].max_dynamic_shared_size_bytes = shared_bytes
            self._shared_bytes[kernel] = shared_bytes
        return self._functions[kernel]
