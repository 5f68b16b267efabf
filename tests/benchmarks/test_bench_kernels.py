"""The kernels' benchmark runs from end to end on sizes that this CPU can do, before a GPU is borrowed for it."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels, bench_multi_lora
from tests.engine.kernels.conftest import MakeHost, host_launcher

__all__ = ["host_launcher"]


def test_every_point_is_checked_timed_and_written(host_launcher: MakeHost, tmp_path: Path) -> None:
    record = bench_kernels.run(host_launcher(0), torch.device("cpu"), tmp_path, rounds=2, minutes=5, is_small=True)
    assert json.loads((tmp_path / "kernels.json").read_text())["points"] == json.loads(json.dumps(record["points"]))
    assert [point["kernel"] for point in record["points"]] == ["multi_lora", "multi_adamw", "segment_cross_entropy"]
    first = record["points"][0]
    assert set(first["times"]) == {"frozen", "ours", "first", "after", "cublas", "peft"}
    assert first["chosen"] == ["after"] and first["faster"] in ("first", "after")
    assert all(time["ms"] > 0 for point in record["points"] for time in point["times"].values())
    assert record["left_out"] == 0 and record["environment"]["commit"]


def test_a_wrong_kernel_is_not_timed(host_launcher: MakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_multi_lora.ours
    monkeypatch.setattr(
        bench_multi_lora, "ours", lambda given, launcher, first=None: (given.dys, *right(given, launcher, first)[1:])
    )
    with pytest.raises(AssertionError, match="32x24, 8"):
        bench_kernels.run(host_launcher(0), torch.device("cpu"), tmp_path, rounds=2, minutes=5, is_small=True)


def test_what_the_time_does_not_suffice_for_is_counted(host_launcher: MakeHost, tmp_path: Path) -> None:
    record = bench_kernels.run(host_launcher(0), torch.device("cpu"), tmp_path, rounds=2, minutes=0, is_small=True)
    assert record["points"] == [] and record["left_out"] == 3
