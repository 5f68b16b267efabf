"""How a kernel in `cuda/` is launched: one packed struct, on torch's current stream, with torch's memory by pointer.

A struct is a numpy dtype whose fields are those of the C++ struct, in order; a POINTER field holds an address. A
Launcher is what runs it: CuPy on a GPU (`engine.kernels.device`), software on a CPU in the tests.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

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


class Launcher(Protocol):
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

    def remembered(self, key: Hashable, make: Callable[[], V]) -> V:
        """What `make` makes, once for a key: tables that many launches read. The least used of many are forgotten."""


class Memory:
    """`Launcher.remembered`: least recently used first out."""

    def __init__(self, capacity: int = 4096) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._capacity = capacity

    def remembered(self, key: Hashable, make: Callable[[], V]) -> V:
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        value: V = self._kept[key]
        return value


def struct_of(fields: Sequence[tuple[str, Any]]) -> np.dtype[Any]:
    """The dtype of a C++ struct: each field aligned to its own size, as the compiler does it."""
    return np.dtype(list(fields), align=True)


def upload(rows: NDArray[Any], device: torch.device) -> Table:
    """Structs as bytes on the device."""
    raw = np.frombuffer(rows.tobytes() or b"\0", dtype=np.uint8).copy()
    return Table(torch.from_numpy(raw).to(device), rows.dtype)


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
