"""Launches a kernel of `cuda/`: one packed struct, on torch's current stream, with pointers to torch's memory.

A struct is a numpy dtype with the fields of the C++ struct, in order; a POINTER field holds an address. A Launcher runs
it: CuPy on a GPU (`engine.kernels.cupy_launcher`), software on a CPU in the tests.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.transfer import to_device

POINTER = np.dtype(np.uint64, metadata={"is_pointer": True})
SUFFIXES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

V = TypeVar("V")


@dataclass(frozen=True)
class Kernel:
    """A `__global__` function: `source` without its folder, `name` as in the source."""

    source: str
    name: str


@dataclass(frozen=True)
class DeviceTable:
    """An array of structs in the device's memory."""

    tensor_B: torch.Tensor
    dtype: np.dtype[Any]


class Uploader(Protocol):
    """Uploads tables to one device."""

    device: torch.device

    def upload(self, rows: NDArray[Any]) -> DeviceTable:
        """Copy structs to the device, in the order of its current stream. The host does not wait for the copy."""


class Launcher(Uploader, Protocol):
    """Runs kernels on one device."""

    @property
    def num_multiprocessors(self) -> int: ...

    @property
    def stream(self) -> int:
        """The device's stream that launches go to now."""

    def launch(
        self,
        kernel: Kernel,
        num_blocks: int,
        shared_bytes: int,
        struct: NDArray[Any],
        tables: Sequence[DeviceTable],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """Launch the kernel. `tables` and `tensors` are all memory that `struct` and the tables point into."""

    def get_or_create(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the current stream's cached value of `key`, created by `make` at first: tables that launches read."""

    def subcache(self, name: str, capacity: int) -> "LruCache":
        """Return a separate cache of the current stream for some values, with its own capacity."""


class LruCache:
    """A cache that drops the least recently used value beyond its capacity; `capacity` None drops none."""

    def __init__(self, capacity: int | None = 4096) -> None:
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._capacity = capacity

    def get_or_create(self, key: Hashable, make: Callable[[], V]) -> V:
        if key not in self._values:
            self._values[key] = make()
            if self._capacity is not None and len(self._values) > self._capacity:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        value: V = self._values[key]
        return value

    def subcache(self, name: Hashable, capacity: int) -> "LruCache":
        """Return a cache within this one, with its own capacity; unbounded if this one is."""
        return self.get_or_create(("subcache", name), lambda: LruCache(None if self._capacity is None else capacity))


class CachingUploader:
    """The part that all launchers share: a cache of tables, and their upload to the device.

    Each stream has cached values of its own. A table is then read on the stream that copies it, so the copy is over;
    and counters of split sums, which a launch uses and leaves at zero, are never used by two launches at once.

    A recorded graph has a separate cache that lives as long as the graph: no table that its launches read is ever
    dropped. While a graph is captured no copy runs: tables uploaded then are written after the capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._cache = device, LruCache()
        self._unwritten: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def stream(self) -> int:
        """The device's stream that launches go to now; 0 on a device without streams."""
        return 0

    def get_or_create(self, key: Hashable, make: Callable[[], V]) -> V:
        return self._cache.get_or_create((self.stream, key), make)

    def subcache(self, name: str, capacity: int) -> LruCache:
        return self._cache.subcache((self.stream, name), capacity)

    def upload(self, rows: NDArray[Any]) -> DeviceTable:
        raw_B = torch.from_numpy(np.frombuffer(rows.tobytes() or b"\0", dtype=np.uint8).copy())
        if self._unwritten is None:
            return DeviceTable(to_device(raw_B, self.device), rows.dtype)
        table_B = torch.empty(len(raw_B), dtype=torch.uint8, device=self.device)
        self._unwritten.append((table_B, raw_B))
        return DeviceTable(table_B, rows.dtype)

    @contextmanager
    def using_cache(self, cache: LruCache) -> Iterator[None]:
        """Use `cache` instead of the launcher's own within the context."""
        previous, self._cache = self._cache, cache
        try:
            yield
        finally:
            self._cache = previous

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Collect tables uploaded during a capture, and write them after it if it succeeded."""
        unwritten = self._unwritten = list[tuple[torch.Tensor, torch.Tensor]]()
        try:
            yield
        finally:
            self._unwritten = None
        for table_B, raw_B in unwritten:
            table_B.copy_(raw_B)


def struct_of(fields: Sequence[tuple[str, Any]]) -> np.dtype[Any]:
    """Return the dtype of a C++ struct: each field aligned to its own size, as the compiler aligns it."""
    return np.dtype(list(fields), align=True)


def pack(dtype: np.dtype[Any], **fields: Any) -> NDArray[Any]:
    """Return one struct, with addresses of tensors and tables, and null pointers for None.

    Raises KeyError for a field that is missing or unknown.
    """
    struct = np.zeros((), dtype)
    assert dtype.names is not None
    for name in dtype.names:
        value = fields.pop(name)
        struct[name] = address(value) if isinstance(value, torch.Tensor | DeviceTable | None) else value
    if fields:
        raise KeyError(f"the struct has no fields {sorted(fields)}")
    return struct


def address(value: torch.Tensor | DeviceTable | None) -> int:
    if value is None:
        return 0
    return (value.tensor_B if isinstance(value, DeviceTable) else value).data_ptr()
