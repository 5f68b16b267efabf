"""Tests the CuPy launcher against a model of the driver: context, stream and shared memory of each launch."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels import cupy_launcher
from engine.kernels.constants import THREADS
from engine.kernels.cupy_launcher import CupyLauncher
from engine.kernels.launch import Kernel

STRUCT = np.zeros((), np.dtype([("value", np.int32)]))
KERNEL = Kernel("multi_adamw.cu", "multi_adamw")


class Driver:
    """Models what CuPy does with the driver: a call from a thread without a context fails, as CUDA's do."""

    def __init__(self) -> None:
        self.thread = threading.local()
        self.launches: list[tuple[Any, ...]] = []
        self.shared_bytes = 48 << 10
        runtime = SimpleNamespace(setDevice=self.set_device)
        self.cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), RawModule=self.raw_module)

    def set_device(self, index: int) -> None:
        self.thread.device = index

    def check_context(self) -> None:
        if getattr(self.thread, "device", None) != 3:
            raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")

    def raw_module(self, *, path: str) -> Any:
        driver = self

        class Function:
            @property
            def max_dynamic_shared_size_bytes(self) -> int:
                return driver.shared_bytes

            @max_dynamic_shared_size_bytes.setter
            def max_dynamic_shared_size_bytes(self, size: int) -> None:
                driver.check_context()
                driver.shared_bytes = size

            def __call__(self, grid: tuple[int], block: tuple[int], args: Any, *, shared_mem: int, stream: Any) -> None:
                driver.check_context()
                assert shared_mem <= driver.shared_bytes
                driver.launches.append((grid, block, args[0]["value"].item(), shared_mem, stream.ptr))

        def get_function(name: str) -> Function:
            driver.check_context()
            return Function()

        return SimpleNamespace(get_function=get_function)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setitem(sys.modules, "cupy", driver.cupy)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())  # sets nothing for the thread's default device
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=getattr(driver.thread, "stream", 0))
    )
    monkeypatch.setattr(cupy_launcher, "cubin", lambda source, architecture: Path(f"{source}-{architecture}"))
    yield driver


def test_each_thread_launches_on_its_stream_with_the_devices_context(driver: Driver) -> None:
    """autograd's threads launch without having called CUDA before; the second needs more shared memory."""
    launcher = CupyLauncher(torch.device("cuda", 3))
    failures: list[BaseException] = []

    def launch(stream: int, shared_bytes: int) -> None:
        try:
            driver.thread.stream = stream
            launcher.launch(KERNEL, 5, shared_bytes, STRUCT, [], [])
        except BaseException as error:
            failures.append(error)

    for stream, shared_bytes in ((7, 100), (8, 90 << 10), (9, 60 << 10)):
        thread = threading.Thread(target=launch, args=(stream, shared_bytes))
        thread.start()
        thread.join()
    assert not failures
    assert [(launch[3], launch[4]) for launch in driver.launches] == [(100, 7), (90 << 10, 8), (60 << 10, 9)]
    assert driver.launches[0][:3] == ((5,), (THREADS,), 0) and driver.shared_bytes == 90 << 10


def test_the_installed_cupy_has_what_the_launcher_calls() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        module = cupy.RawModule(path="missing.cubin")
    assert callable(module.get_function) and callable(cupy.cuda.runtime.setDevice)
    assert isinstance(cupy.RawKernel.max_dynamic_shared_size_bytes, type(cupy.RawKernel.num_regs))  # a property
