"""Runs a kernel's source on this CPU: launches go to a server that is built with sanitizers.

The server is one process for each source, started at its first launch. Tensors are sent as bytes, each into an
separate allocation, pointers in structs are translated, and the tensors are copied back afterwards.
"""

import hashlib
import os
import struct
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.constants import THREADS, macros
from engine.kernels.launch import CachingUploader, DeviceTable, Kernel

HERE = Path(__file__).parent
CUDA = HERE.parents[3] / "cuda"
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiled(source: str, folder: Path) -> Path:
    """Return the server of `cuda/<source>`, built unless `folder` has it."""
    parts = [CUDA / source, *sorted(CUDA.glob("*.cuh")), *sorted(HERE.glob("*.h")), HERE / "server.cpp"]
    texts = [*(path.read_bytes() for path in parts), " ".join(macros()).encode()]
    digest = hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
    binary = folder / f"{Path(source).stem}-{sysconfig.get_platform()}-{digest}"
    if not binary.exists():
        unfinished = binary.with_suffix(f".{os.getpid()}")
        options = [*FLAGS, *SANITIZERS, f"-I{CUDA}", f"-I{HERE}", *macros(), f'-DSOURCE="{source}"']
        command = ["g++", *options, str(HERE / "server.cpp")]
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        unfinished.rename(binary)
    return binary


class HostLauncher(CachingUploader):
    """A Launcher on the CPU. `seed` 0 runs threads in order, another in a random order."""

    num_multiprocessors, stream = 1, 0

    def __init__(self, folder: Path, seed: int = 0) -> None:
        super().__init__(torch.device("cpu"))
        self.folder, self.seed = folder, seed
        self.launched: list[str] = []
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    def launch(
        self,
        kernel: Kernel,
        num_blocks: int,
        shared_bytes: int,
        struct: NDArray[Any],
        tables: Sequence[DeviceTable],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        self.launched.append(kernel.name)
        whole = _Storages([*(table.tensor_B for table in tables), *tensors])
        structs = [(0, struct.reshape(1)), *((whole.number_of(t.tensor_B), _rows(t)) for t in tables)]
        pointers = [place for buffer, rows in structs for place in _pointers(buffer, rows, whole)]
        request = _request(kernel.name, (num_blocks, THREADS, shared_bytes, self.seed), struct, whole, pointers)
        answers = self._ask(kernel.source, request, whole)
        read_only = {whole.number_of(table.tensor_B) for table in tables}  # their pointers were translated over there
        for number, (storage, answer) in enumerate(zip(whole.tensors_B, answers, strict=True), start=1):
            if answer and number not in read_only:
                storage.copy_(torch.frombuffer(bytearray(answer), dtype=torch.uint8))

    def _ask(self, source: str, request: bytes, whole: "_Storages") -> list[bytes]:
        server = self._servers.get(source)
        if server is None or server.poll() is not None:
            server = self._servers[source] = self._start(source)
        assert server.stdin and server.stdout
        try:
            server.stdin.write(request)
            server.stdin.flush()
        except BrokenPipeError:
            pass  # it says why on its standard error
        answers = [server.stdout.read(storage.numel()) for storage in whole.tensors_B]
        if [len(a) for a in answers] != [storage.numel() for storage in whole.tensors_B]:
            server.wait()
            raise HostError((self.folder / f"{server.pid}.log").read_text())
        return answers

    def _start(self, source: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"starting-{os.getpid()}-{len(self._servers)}.log"
        options = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
        with log.open("wb") as stderr:
            binary = compiled(source, self.folder)
            server = subprocess.Popen(
                [binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=options
            )
        log.rename(self.folder / f"{server.pid}.log")
        return server

    def close(self) -> None:
        for server in self._servers.values():
            server.communicate()


class HostError(AssertionError):
    """Raised when a kernel commits a fault, with the message of the sanitizer or the shim."""


class _Storages:
    """The storages of tensors, each once: buffers 1, 2, ... of a request."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self.tensors_B = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]  # type: ignore[call-overload]
        self.starts = np.array(list(storages), np.uint64)
        self.ends = self.starts + np.array([t.numel() for t in self.tensors_B], np.uint64)

    def number_of(self, tensor: torch.Tensor) -> int:
        return int(np.flatnonzero(self.starts == tensor.untyped_storage().data_ptr())[0]) + 1

    def find(self, address: int) -> tuple[int, int]:
        """Return (buffer, offset) of an address."""
        inside = np.flatnonzero((self.starts <= address) & ((address < self.ends) | (self.starts == address)))
        assert len(inside), "a struct points where no tensor of the launch is"
        return int(inside[0]) + 1, address - int(self.starts[inside[0]])


def _rows(table: DeviceTable) -> NDArray[Any]:
    size = table.tensor_B.numel() // table.dtype.itemsize * table.dtype.itemsize
    return np.frombuffer(table.tensor_B[:size].numpy().tobytes(), table.dtype)


def _pointers(buffer: int, rows: NDArray[Any], whole: _Storages) -> list[tuple[int, int, int, int]]:
    """Return (buffer, offset, buffer pointed to, offset in it) of every pointer that is not null."""
    return [(buffer, at, *whole.find(address)) for at, address in _addresses(rows) if address]


def _addresses(rows: NDArray[Any]) -> list[tuple[int, int]]:
    """Return (offset, address) of all pointers in structs, and in the arrays of structs that they hold."""
    places = []
    for name, field in (rows.dtype.fields or {}).items():
        kind, at = field[0], field[1]
        for i in range(len(rows)) if kind.subdtype or (kind.metadata or {}).get("is_pointer") else ():
            start = i * rows.dtype.itemsize + at
            if kind.subdtype:
                places += [(start + inner, address) for inner, address in _addresses(rows[name][i])]
            else:
                places.append((start, int(rows[name][i])))
    return places


def _request(
    name: str,
    sizes: tuple[int, int, int, int],
    launch: NDArray[Any],
    whole: _Storages,
    pointers: Sequence[tuple[int, int, int, int]],
) -> bytes:
    buffers = [launch.tobytes(), *(t.numpy().tobytes() for t in whole.tensors_B)]
    parts = [struct.pack("<I", len(name)), name.encode(), struct.pack("<4I", *sizes), struct.pack("<I", len(buffers))]
    for raw in buffers:
        parts += [struct.pack("<Q", len(raw)), raw]
    parts.append(struct.pack("<I", len(pointers)))
    parts += [struct.pack("<IQIQ", *place) for place in pointers]
    return b"".join(parts)
