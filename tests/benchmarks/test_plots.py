"""Plots show the figures of the raw results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import plots

WORK = {
    "model": "small", "work": "mixed, 2 tasks", "effective_tokens": [106, 322],
    "seconds_by_round": {"engine": [1.0, 1.0], "peft, longest": [4.0, 4.0], "engine, fusion off": [2.0, 2.0]},
    "peak_bytes": {"engine": 1.25e9, "peft, longest": 3.5e9},
}  # fmt: skip


@pytest.mark.parametrize("num_works", [1, 3])
def test_every_system_of_every_work_has_its_bar_and_figure(
    num_works: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "PLOTS", tmp_path / "plots")
    raw = {"benchmark": "side_by_side_cpu", "work": [{**WORK, "work": f"mixed, {i} tasks"} for i in range(num_works)]}
    (tmp_path / "side_by_side_cpu.json").write_text(json.dumps(raw))
    paths = plots.draw("side_by_side_cpu")
    assert {path.name for path in paths} == {"speed_cpu.png", "speed_cpu.svg", "bytes_cpu.png", "bytes_cpu.svg"}
    assert counts(tmp_path / "plots/speed_cpu.svg", ["engine", "peft, longest", "214", "54", "107"]) == [num_works] * 5
    assert counts(tmp_path / "plots/bytes_cpu.svg", ["engine", "1.25", "3.50"]) == [num_works] * 3
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in plots.draw("side_by_side_cpu")] == first  # no noise in the history


def counts(svg: Path, texts: list[str]) -> list[int]:
    """Return how often each text is in the picture."""
    labels = re.findall(r">([^<>]+)</text>", svg.read_text())
    return [labels.count(text) for text in texts]
