"""Tests that every kernel compiles for every supported architecture without spills, and that structs match."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.kernels import compile as kernels
from engine.kernels import grouped_gemm_device, multi_adamw, multi_affine_device, multi_grad_norm, segment_cross_entropy
from engine.kernels.constants import macros
from engine.kernels.multi_lora import structs

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
BY_ARCHITECTURE = [pytest.param(name, marks=[] if name == "sm_90" else pytest.mark.thorough) for name in ARCHITECTURES]
TABLE = Path(__file__).with_name("registers.json")  # written by `python tests/engine/kernels/test_compile.py`
MAX_REGISTERS = 168  # three blocks of 128 threads on a multiprocessor
STRUCTS = {
    "LoraUse": ("multi_lora.cuh", structs.USE),
    "LoraFactors": ("multi_lora.cuh", structs.FACTORS),
    "LoraTile": ("multi_lora.cuh", structs.RANKS),
    "LoraSplit": ("multi_lora.cuh", structs.SPLIT),
    "LoraItem": ("multi_lora.cuh", structs.ITEM),
    "LoraStream": ("multi_lora.cuh", structs.STREAM),
    "LoraLaunch": ("multi_lora.cuh", structs.LAUNCH),
    "NormTask": ("multi_grad_norm.cu", multi_grad_norm.TASK),
    "NormItem": ("multi_grad_norm.cu", multi_grad_norm.ITEM),
    "NormLaunch": ("multi_grad_norm.cu", multi_grad_norm.LAUNCH),
    "AdamWGroup": ("multi_adamw.cu", multi_adamw.GROUP),
    "AdamWItem": ("multi_adamw.cu", multi_adamw.ITEM),
    "AdamWLaunch": ("multi_adamw.cu", multi_adamw.LAUNCH),
    "GemmUse": ("grouped_gemm.cu", grouped_gemm_device.USE),
    "GemmItem": ("grouped_gemm.cu", grouped_gemm_device.ITEM),
    "GemmLaunch": ("grouped_gemm.cu", grouped_gemm_device.LAUNCH),
    "AffineUse": ("multi_affine.cu", multi_affine_device.USE),
    "AffineItem": ("multi_affine.cu", multi_affine_device.ITEM),
    "AffineLaunch": ("multi_affine.cu", multi_affine_device.LAUNCH),
    "CrossEntropyLaunch": ("segment_cross_entropy.cu", segment_cross_entropy.LAUNCH),
}


def measured(source: str, architecture: str) -> dict[str, int]:
    """Return registers by kernel; check that none spills."""
    resources = kernels.resources(kernels.compile_source(source, architecture).log)
    assert all(item.stack_bytes == 0 and item.spill_bytes == 0 for item in resources), resources
    return {item.kernel: item.registers for item in resources}


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
@pytest.mark.parametrize("source", kernels.sources())
def test_compiles_without_spills_into_the_registers_of_the_table(source: str, architecture: str) -> None:
    registers, table = measured(source, architecture), json.loads(TABLE.read_text())
    assert set(registers) == set(kernel_names(source)) and max(registers.values()) <= MAX_REGISTERS
    if table["compiler"] == kernels.compiler_version():
        assert registers == table[architecture][source], "run `python tests/engine/kernels/test_compile.py`"


def kernel_names(source: str) -> set[str]:
    """Return the names in `KERNEL(name, ...)` after the host compiler's preprocessor."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    command = ["g++", "-E", "-P", "-x", "c++", "-DMUXTUNE_ON_HOST", *macros(), f"-I{kernels.CUDA}"]
    host = Path(__file__).parent / "host"
    done = subprocess.run(
        [*command, f"-I{host}", str(kernels.CUDA / source)], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"emplace\(\"(\w+)\"", done.stdout))


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", kernels.sources())
def test_compiles_with_nvcc(source: str, tmp_path: Path) -> None:
    options = ["-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", *macros(), "-o", str(tmp_path / "out.cubin")]
    command = ["nvcc", *options, str(kernels.CUDA / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert all(item.spill_bytes == 0 for item in kernels.resources(done.stderr))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_structs_are_laid_out_as_their_kernels_read_them(tmp_path: Path) -> None:
    headers = sorted({header for header, _ in STRUCTS.values()})
    lines = ["#include <cstddef>", *(f'#include "{header}"' for header in headers)]
    for name, (header, dtype) in STRUCTS.items():
        lines += [f"static_assert(sizeof({name}) == {dtype.itemsize});", *offsets(name, dtype)]
        declared = re.search(rf"struct {name} {{(.*?)\n}};", (kernels.CUDA / header).read_text(), re.S)
        assert declared and fields(declared[1]) == list(dtype.names or ())
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines))
    command = ["g++", "-std=c++20", "-fsyntax-only", "-DMUXTUNE_ON_HOST", *macros(), f"-I{kernels.CUDA}"]
    done = subprocess.run(
        [*command, f"-I{Path(__file__).parent / 'host'}", str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def offsets(name: str, dtype: np.dtype[Any]) -> list[str]:
    return [
        f"static_assert(offsetof({name}, {field}) == {at} && sizeof({name}::{field}) == {of.itemsize});"
        for field, (of, at, *_) in (dtype.fields or {}).items()
    ]


def fields(body: str) -> list[str]:
    """Return the names declared in a struct's body, in order."""
    text = re.sub(r"//[^\n]*|\[[^\]]*\]", "", body)
    return [name for line in text.split(";") for name in re.findall(r"(\w+)\s*(?=,|$)", line.strip())]


def test_a_compile_error_has_the_compilers_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void f() { undeclared(); }')
    monkeypatch.setattr(kernels, "CUDA", tmp_path)
    with pytest.raises(kernels.KernelCompileError, match="undeclared"):
        kernels.compile_source("broken.cu", "sm_90")


def test_a_cached_cubin_is_used_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.cu").write_text('extern "C" __global__ void f() {}')
    monkeypatch.setattr(kernels, "CUDA", tmp_path)
    monkeypatch.setattr(kernels, "PREBUILT", tmp_path / "built")
    first = kernels.cubin("one.cu", "sm_90")
    monkeypatch.setattr(kernels, "compile_source", None)  # a second compile would fail
    assert kernels.cubin("one.cu", "sm_90") == first and first.read_bytes()[:4] == b"\x7fELF"
    before = kernels.digest("one.cu")
    (tmp_path / "shared.cuh").write_text("// new")
    assert kernels.digest("one.cu") != before


def test_a_process_uses_prebuilt_cubins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.cu").write_text('extern "C" __global__ void f() {}')
    monkeypatch.setattr(kernels, "CUDA", tmp_path)
    monkeypatch.setattr(kernels, "PREBUILT", tmp_path / "built")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = kernels._write(
        b"not prebuilt", kernels._name("one.cu", "sm_90"), [tmp_path / "cache" / "muxtune" / "kernels"]
    )
    assert kernels.cubin("one.cu", "sm_90") == cached
    kernels.main(["sm_80", "sm_90"])  # whatever the cache holds
    built = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.parent for path in built] == [tmp_path / "built"] * 2
    monkeypatch.setattr(kernels, "compile_source", None)
    assert kernels.cubin("one.cu", "sm_90") == built[1]


@pytest.mark.parametrize("arguments", [[], ["hopper"]])
def test_an_architecture_must_be_named(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="sm_80 sm_90"):
        kernels.main(arguments)


def test_an_installed_package_has_the_sources_and_room_for_cubins(tmp_path: Path) -> None:
    """Installs a wheel without the checkout, as an image does."""
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=kernels.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "from engine.kernels import compile as k; print(*k.sources()); print(k.PREBUILT); k.digest(k.sources()[0])"
    where = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=where, capture_output=True, text=True, check=True
    )
    names, prebuilt = done.stdout.splitlines()
    assert names.split() == kernels.sources() and Path(prebuilt) == site / "engine" / "kernels" / "cubins"


if __name__ == "__main__":
    table: dict[str, Any] = {"compiler": kernels.compiler_version()}
    for architecture in ARCHITECTURES:
        table[architecture] = {source: measured(source, architecture) for source in kernels.sources()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
