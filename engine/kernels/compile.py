"""Compiles `cuda/*.cu` to cubins by NVRTC, which needs neither a GPU, nor a driver, nor the CUDA toolkit.

`python -m engine.kernels.compile sm_80 sm_90 ...` builds all sources for these architectures into build/kernels (of an
installed package: beside it). A cubin is used as long as its sources do not change. A missing one is compiled at first
use and written to that folder or, if it is read-only, to the user's cache folder.
"""

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.kernels.constants import macros

ROOT = Path(__file__).parents[2]
INSTALLED = Path(__file__).parent / "cuda"  # where a wheel has the sources
CUDA = INSTALLED if INSTALLED.is_dir() else ROOT / "cuda"
PREBUILT = INSTALLED.with_name("cubins") if INSTALLED.is_dir() else ROOT / "build" / "kernels"
OPTIONS = ("--std=c++17", "--ptxas-options=-v", *macros())


class KernelCompileError(RuntimeError):
    """Raised when a kernel does not compile, with the compiler's log."""


@dataclass(frozen=True)
class CompiledSource:
    """A cubin with the assembler's log."""

    cubin: bytes
    log: str


@dataclass(frozen=True)
class KernelResources:
    """Resources that one kernel uses of a multiprocessor. A stack or spills mean that registers did not suffice."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def sources() -> list[str]:
    return sorted(path.name for path in CUDA.glob("*.cu"))


def compile_source(source: str, architecture: str) -> CompiledSource:
    """Compile `cuda/<source>` for one architecture (`sm_90`). Raises KernelCompileError."""
    from cuda.bindings import nvrtc  # only where kernels are compiled

    text = (CUDA / source).read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", f"-I{CUDA}", *OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().rstrip("\0")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelCompileError(f"{source} for {architecture}: {log}")
        return CompiledSource(_read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiler_version() -> str:
    from cuda.bindings import nvrtc

    major, minor = _checked(nvrtc.nvrtcVersion())
    return f"{major}.{minor}"


def resources(log: str) -> list[KernelResources]:
    """Return the resources of each kernel in the assembler's verbose log."""
    kernels = []
    for part in log.split("Compiling entry function '")[1:]:
        frame, stores, loads = map(int, _numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part))
        (registers,) = map(int, _numbers(r"Used (\d+) registers", part))
        kernels.append(KernelResources(part.partition("'")[0], registers, frame, stores + loads))
    return sorted(kernels, key=lambda kernel: kernel.kernel)


def cubin(source: str, architecture: str) -> Path:
    """Return the cubin's file: prebuilt, cached, or compiled now. Raises KernelCompileError."""
    name = _name(source, architecture)
    for folder in _folders():
        if (folder / name).is_file():
            return folder / name
    return _write(compile_source(source, architecture).cubin, name)


def build(source: str, architecture: str) -> Path:
    """Return the prebuilt cubin's file, and compile it if it does not exist. Raises KernelCompileError."""
    file = PREBUILT / _name(source, architecture)
    return file if file.is_file() else _write(compile_source(source, architecture).cubin, file.name, [PREBUILT])


def digest(source: str) -> str:
    """Hash the source, the headers and the options, constants included: equal digests mean equal cubins."""
    hashed = hashlib.sha256(repr(OPTIONS).encode())
    for path in [CUDA / source, *sorted(CUDA.glob("*.cuh"))]:
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:16]


def _name(source: str, architecture: str) -> str:
    return f"{Path(source).stem}-{architecture}-{digest(source)}.cubin"


def _folders() -> Iterator[Path]:
    yield PREBUILT
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muxtune" / "kernels"


def _write(cubin_bytes: bytes, name: str, folders: Iterable[Path] | None = None) -> Path:
    """Write the file to the first folder that can be written, at once: another process may read at the same time."""
    candidates = list(folders or _folders())
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(cubin_bytes)
            os.replace(file.name, folder / name)
        except OSError:
            continue
        return folder / name
    raise KernelCompileError(f"cannot write {name} to any of these folders: {', '.join(map(str, candidates))}")


def _checked(result: Any) -> Any:
    status, *values = result
    if int(status) != 0:
        raise KernelCompileError(f"NVRTC: {status}")
    return values[0] if len(values) == 1 else values


def _read(size_of: Any, read: Any, program: Any) -> bytes:
    buffer = bytes(_checked(size_of(program)))
    _checked(read(program, buffer))
    return buffer


def _numbers(pattern: str, text: str) -> Sequence[str]:
    match = re.search(pattern, text)
    if match is None:
        raise KernelCompileError(f"the assembler's log does not match {pattern!r}: {text[:500]}")
    return match.groups()


def main(architectures: Sequence[str]) -> None:
    if not architectures or not all(re.fullmatch(r"sm_\d+a?", name) for name in architectures):
        sys.exit("usage: python -m engine.kernels.compile ARCHITECTURE ...   such as sm_80 sm_90 sm_100")
    try:
        for architecture in architectures:
            for source in sources():
                print(build(source, architecture))
    except KernelCompileError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
