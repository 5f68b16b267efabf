"""The kernels' benchmark runs from end to end on sizes that this CPU can do, before a GPU is borrowed for it."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_kernels, bench_multi_lora
from benchmarks.bench_multi_lora import Inputs
from benchmarks.lorafusion import LoraFusion, NotDoneError, refusal
from engine.kernels.compile import sources
from engine.kernels.multi_lora.types import AdapterSlice
from tests.engine.kernels.conftest import MakeHost, host_launcher

__all__ = ["host_launcher"]
CPU = torch.device("cpu")


def small_jobs(host_launcher: MakeHost, peers: dict[str, Any] | None = None) -> bench_kernels.Jobs:
    return bench_kernels.jobs(host_launcher(0), CPU, 2, True, peers)


def test_every_kernel_is_checked_timed_and_written(host_launcher: MakeHost, tmp_path: Path) -> None:
    jobs = small_jobs(host_launcher)
    assert {source.removesuffix(".cu") for source in sources()} == set(jobs) - {"layer"}
    record = bench_kernels.run(jobs, CPU, tmp_path, minutes=5)
    assert json.loads((tmp_path / "kernels.json").read_text())["points"] == json.loads(json.dumps(record["points"]))
    assert [point["kernel"] for point in record["points"]] == list(jobs)
    first = record["points"][0]
    assert set(first["times"]) == {"frozen", "ours", "first", "after", "cublas", "grouped_mm", "peft"}
    assert first["chosen"] == ["after"] and first["faster"] in ("first", "after")
    assert set(record["points"][1]["times"]) == {"frozen", "ours", "peft"}
    assert all(time["ms"] > 0 for point in record["points"] for time in point["times"].values())
    assert record["left_out"] == 0 and record["environment"]["commit"]
    table = [line for line in (tmp_path / "kernels.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(jobs) and {line.count("|") for line in table} == {len(bench_kernels.HEADER) + 1}


def test_a_wrong_kernel_is_not_timed(host_launcher: MakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_multi_lora.ours
    monkeypatch.setattr(bench_multi_lora, "ours", lambda inputs, *rest: (inputs.dys, *right(inputs, *rest)[1:]))
    jobs = small_jobs(host_launcher)
    record = bench_kernels.run(jobs, CPU, tmp_path, minutes=5)
    [failed] = record["failed"]
    assert failed.startswith("multi_lora: AssertionError") and "32x24, 8" in failed
    assert [point["kernel"] for point in record["points"]] == [kernel for kernel in jobs if kernel != "multi_lora"]
    assert failed in (tmp_path / "kernels.md").read_text()


def test_a_peer_is_timed_where_it_is_right_and_else_left_out_with_the_reason(host_launcher: MakeHost) -> None:
    def unable(inputs: Inputs) -> Any:
        raise NotDoneError("not these widths")

    peers = {
        "right": bench_multi_lora.BlockDiagonal,
        "wrong": lambda _: lambda inputs: (inputs.dys, inputs.x, bench_multi_lora.expected(inputs)[2]),
        "unable": unable,
    }
    point = small_jobs(host_launcher, peers)["multi_lora"][0]()
    assert set(point["times"]) == {"frozen", "ours", "first", "after", "cublas", "grouped_mm", "peft", "right"}
    assert point["left_out"]["unable"] == "not these widths"
    assert point["left_out"]["wrong"].startswith("wrong results")


def test_points_without_time_left_are_counted(host_launcher: MakeHost, tmp_path: Path) -> None:
    jobs = small_jobs(host_launcher)
    record = bench_kernels.run(jobs, CPU, tmp_path, minutes=0)
    assert record["points"] == [] and record["left_out"] == len(jobs)


def test_a_line_has_the_lower_bounds_of_the_card() -> None:
    point = {
        "kernel": "multi_lora", "point": "p", "tokens": 64, "tasks": 2, "extra_bytes": 2e9, "extra_flop": 1e12,
        "errors": {"ours": {"y": 1e-3, "dx": 2e-3}}, "left_out": {"peer": "why"},
        "times": {
            "frozen": {"ms": 10.0}, "ours": {"ms": 13.0, "launch_us": 7.0, "graph_ms": 12.5}, "peft": {"ms": 15.0},
        },
    }  # fmt: skip
    cells = bench_kernels.row(point, {"bytes_per_second": 2e12, "flop_per_second": 5e14})
    assert cells[4:11] == [
        "13.000 (+30.0%)",
        "12.500",
        "7",
        "-",
        "1.000, 2.000",
        "1.50",
        "frozen 10.000; peft 15.000 (+50.0%)",
    ]
    assert cells[11:] == ["ours 2.0e-03", "peer: why"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        bench_kernels.main([])


@pytest.mark.parametrize(
    ("lengths", "widths", "dtype", "words"),
    [
        ([128] * 5, (256, 256), torch.bfloat16, "4 adapters at most, not 5"),
        ([128, 150], (256, 256), torch.bfloat16, "128 tokens: 150"),
        ([128, 128], (256, 200), torch.bfloat16, "widths off 256: 200"),
        ([128, 128], (256, 256), torch.float32, "float32"),
        ([128, 256], (256, 512), torch.bfloat16, None),
    ],
)
def test_points_that_lorafusion_cannot_run_are_refused(
    lengths: list[int], widths: tuple[int, int], dtype: torch.dtype, words: str | None
) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    uses = [AdapterSlice(start, end, 1.0) for start, end in itertools.pairwise(bounds)]
    why = refusal(torch.empty(sum(lengths), widths[0], dtype=dtype), torch.empty(widths), uses)
    assert why is None if words is None else words in (why or "")


def test_a_folder_without_lorafusion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotDoneError, match="not a clone"):
        LoraFusion(tmp_path)


class PlainOps:
    """LoRAFusion's two functions by the names and shapes that its source gives them, in plain torch."""

    @staticmethod
    def prepare_multi_lora_batch_info(**arguments: Any) -> Any:
        assert arguments["dropout_p_list"] == [0.0] * len(arguments["lora_rank_list"])
        info = dict.fromkeys(("block_to_lookup_table", "block_to_dropout_p", "enable_dropout", "same_dropout_p_value"))
        lengths = arguments["seq_len_list"]
        return SimpleNamespace(
            padded_seq_len_list=lengths,
            block_to_alpha=arguments["alpha_list"],
            max_r=max(arguments["lora_rank_list"]),
            **info,
        )

    @staticmethod
    def fused_linear_multi_lora(padded_x: Any, linear_w: Any, **arguments: Any) -> Any:
        parts = padded_x[0].split(arguments["seq_len_list"])
        each = zip(parts, arguments["lora_a_list"], arguments["lora_b_list"], arguments["block_to_alpha"], strict=True)
        return torch.cat([x @ linear_w.T + alpha * (x @ a.T) @ b.T for x, a, b, alpha in each]).unsqueeze(0)


def test_lorafusion_gets_the_same_work_as_ours() -> None:
    peer = LoraFusion.__new__(LoraFusion)
    peer._ops, peer._block = PlainOps, 128
    point = bench_multi_lora.Point("p", ((256, (512, 256)),), 256, 2, (8, 16))
    inputs = Inputs.drawn(point, point.groups[0], CPU)
    results = bench_multi_lora.beside(peer)(inputs)(inputs)
    assert all(e < 2e-2 for e in bench_multi_lora.errors(results, bench_multi_lora.expected(inputs)).values())
