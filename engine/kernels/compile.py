"""From `cuda/*.cu` to cubins, by NVRTC: needs neither a GPU, nor a driver, nor the CUDA toolkit.

`python -m engine.kernels.compile sm_80 sm_90 ...` builds all of them for these architectures into build/kernels (of an
installed package: beside it), from where they are taken as long as the sources stay as they are. What is not there is
compiled at first use and kept there or, where that folder cannot be written, in the user's cache folder.
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

ROOT = Path(__file__).parents[2]
INSTALLED = Path(__file__).parent / "cuda"  # where a wheel has the sources
CUDA = INSTALLED if INSTALLED.is_dir() else ROOT / "cuda"
PREBUILT = INSTALLED.with_name("cubins") if INSTALLED.is_dir() else ROOT / "build" / "kernels"
OPTIONS = ("--std=c++17", "--ptxas-options=-v")


class KernelCompileError(RuntimeError):
    """A kernel does not compile: the compiler's own words."""


@dataclass(frozen=True)
class Compiled:
    """A cubin, and what the assembler said of it."""

    cubin: bytes
    log: str


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a multiprocessor. A stack or spills are registers that did not suffice."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def sources() -> list[str]:
    return sorted(path.name for path in CUDA.glob("*.cu"))


def compile_source(source: str, architecture: str) -> Compiled:
    """`cuda/<source>` for one architecture (`sm_90`). Raises KernelCompileError."""
    from cuda.bindings import nvrtc  # only where kernels are compiled

    text = (CUDA / source).read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", f"-I{CUDA}", *OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().rstrip("\0")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelCompileError(f"{source} for {architecture}: {log}")
        return Compiled(_read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiler_version() -> str:
    from cuda.bindings import nvrtc

    major, minor = _checked(nvrtc.nvrtcVersion())
    return f"{major}.{minor}"


def resources(log: str) -> list[Resources]:
    """What the assembler's verbose log says of each kernel."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        frame, stores, loads = map(int, _numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part))
        (registers,) = map(int, _numbers(r"Used (\d+) registers", part))
        found.append(Resources(part.partition("'")[0], registers, frame, stores + loads))
    return sorted(found, key=lambda item: item.kernel)


def cubin(source: str, architecture: str) -> Path:
    """The cubin's file: prebuilt, kept from before, or compiled now. Raises KernelCompileError."""
    name = _name(source, architecture)
    for folder in _folders():
        if (folder / name).is_file():
            return folder / name
    return _keep(compile_source(source, architecture).cubin, name)


def build(source: str, architecture: str) -> Path:
    """The prebuilt cubin's file, compiled unless it is there. Raises KernelCompileError."""
    file = PREBUILT / _name(source, architecture)
    return file if file.is_file() else _keep(compile_source(source, architecture).cubin, file.name, [PREBUILT])


def digest(source: str) -> str:
    """Of the source, what it includes, and the options: equal digests, equal cubins."""
    hashed = hashlib.sha256(repr(OPTIONS).encode())
    for path in [CUDA / source, *sorted(CUDA.glob("*.cuh"))]:
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:16]


def _name(source: str, architecture: str) -> str:
    return f"{Path(source).stem}-{architecture}-{digest(source)}.cubin"


def _folders() -> Iterator[Path]:
    yield PREBUILT
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muxtune" / "kernels"


def _keep(cubin_bytes: bytes, name: str, folders: Iterable[Path] | None = None) -> Path:
    """Writes whole files only: another process may read at the same time."""
    tried = list(folders or _folders())
    for folder in tried:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(cubin_bytes)
            os.replace(file.name, folder / name)
        except OSError:
            continue
        return folder / name
    raise KernelCompileError(f"no folder to keep {name} in: {', '.join(map(str, tried))} cannot be written")


def _checked(answer: Any) -> Any:
    status, *values = answer
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
        raise KernelCompileError(f"the assembler's log has no {pattern!r}: {text[:500]}")
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
