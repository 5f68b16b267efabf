"""How a kernel in `cuda/` is launched: one packed struct, on torch's current stream, with torch's memory by pointer.

A struct is a numpy dtype whose fields are those of the C++ struct, in order; a POINTER field holds an address. A
Launcher is what runs it: CuPy on a GPU (`engine.kernels.cupy_launcher`), software on a CPU in the tests.
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

THREADS = 128  # of every block: cuda/common.cuh
POINTER = np.dtype(np.uint64, metadata={"is_pointer": True})
SUFFIXES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

V = TypeVar("V")


@dataclass(frozen=True)
class Kernel:
    """A `__global__` function: `source` without its folder, `name` as in the source."""

    source: str
    name: str


@dataclass(frozen=True)
class Table:
    """Structs in the device's memory."""

    tensor_B: torch.Tensor
    dtype: np.dtype[Any]


class Uploader(Protocol):
    """Brings tables to one device."""

    device: torch.device

    def upload(self, rows: NDArray[Any]) -> Table:
        """Structs as bytes on the device, in the order of its current stream: the host does not wait for it."""


class Launcher(Uploader, Protocol):
    """Runs kernels on one device."""

    @property
    def num_multiprocessors(self) -> int: ...

    @property
    def stream(self) -> int:
        """Which of the device's streams launches go to now."""

    def launch(
        self,
        kernel: Kernel,
        num_blocks: int,
        shared_bytes: int,
        struct: NDArray[Any],
        tables: Sequence[Table],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """`tables` and `tensors`: all that `struct` and the tables point into, so that it outlives the call."""

    def get_or_create(self, key: Hashable, make: Callable[[], V]) -> V:
        """What `make` makes, once for a key: tables that many launches read. The least used of many are forgotten."""

    def part(self, name: str, capacity: int) -> "Memory":
        """A memory within it, that keeps so many."""


class Memory:
    """What is made once for a key; the least recently used goes first. `capacity` None: all stays."""

    def __init__(self, capacity: int | None = 4096) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._capacity = capacity

    def get_or_create(self, key: Hashable, make: Callable[[], V]) -> V:
        if key not in self._kept:
            self._kept[key] = make()
            if self._capacity is not None and len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        value: V = self._kept[key]
        return value

    def part(self, name: str, capacity: int) -> "Memory":
        """A memory within it, that keeps so many; all, where it itself keeps all."""
        return self.get_or_create(("part", name), lambda: Memory(None if self._capacity is None else capacity))


class Tables:
    """What a launcher remembers, and how tables come to its device.

    A graph that is recorded has a memory of its own, which lives as long as it: what its launches read is in no
    other's and is never forgotten. While it is captured nothing runs: tables made then are written at its end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._memory = device, Memory()
        self._unwritten: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def get_or_create(self, key: Hashable, make: Callable[[], V]) -> V:
        return self._memory.get_or_create(key, make)

    def part(self, name: str, capacity: int) -> Memory:
        return self._memory.part(name, capacity)

    def upload(self, rows: NDArray[Any]) -> Table:
        raw_B = torch.from_numpy(np.frombuffer(rows.tobytes() or b"\0", dtype=np.uint8).copy())
        if self._unwritten is None:
            return Table(to_device(raw_B, self.device), rows.dtype)
        there_B = torch.empty(len(raw_B), dtype=torch.uint8, device=self.device)
        self._unwritten.append((there_B, raw_B))
        return Table(there_B, rows.dtype)

    @contextmanager
    def remembering(self, memory: Memory) -> Iterator[None]:
        """`memory` instead of the launcher's own for a while."""
        own, self._memory = self._memory, memory
        try:
            yield
        finally:
            self._memory = own

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Around a capture: at its end, if it went well, its tables are written."""
        unwritten = self._unwritten = list[tuple[torch.Tensor, torch.Tensor]]()
        try:
            yield
        finally:
            self._unwritten = None
        for there_B, raw_B in unwritten:
            there_B.copy_(raw_B)


def struct_of(fields: Sequence[tuple[str, Any]]) -> np.dtype[Any]:
    """The dtype of a C++ struct: each field aligned to its own size, as the compiler does it."""
    return np.dtype(list(fields), align=True)


def pack(dtype: np.dtype[Any], **fields: Any) -> NDArray[Any]:
    """One struct; a tensor or table stands for its address, None for a null pointer. Raises KeyError for a field left
    out or unknown."""
    struct = np.zeros((), dtype)
    assert dtype.names is not None
    for name in dtype.names:
        value = fields.pop(name)
        struct[name] = address(value) if isinstance(value, torch.Tensor | Table | None) else value
    if fields:
        raise KeyError(f"no such fields: {sorted(fields)}")
    return struct


def address(value: torch.Tensor | Table | None) -> int:
    if value is None:
        return 0
    return (value.tensor_B if isinstance(value, Table) else value).data_ptr()
