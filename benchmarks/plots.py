"""Draws the plots of RESULTS.md and the README from the raw figures in `results/`, as PNG and SVG in `plots/`.

PYTHONPATH=. python benchmarks/plots.py      (draws all; each benchmark also redraws its plots when it runs)
"""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import RESULTS

PLOTS = Path(__file__).parent / "plots"
_OURS, _THEIRS, _WITHOUT = "#1f5fa8", "#9aa5b1", "#8fb4de"  # the engine, its peers, the engine with something off
_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5,
    "svg.hashsalt": "muxtune", "svg.fonttype": "none", "figure.dpi": 130,
}  # fmt: skip


def draw(benchmark: str) -> list[Path]:
    """Draw every plot of a benchmark from its raw figures. Return the written files."""
    raw = json.loads((RESULTS / f"{benchmark}.json").read_text())
    PLOTS.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, figure in _DRAWN[benchmark](raw).items():
            for kind in ("png", "svg"):
                path = PLOTS / f"{name}.{kind}"
                figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None)
                paths.append(path)
            pyplot.close(figure)
    return paths


def side_by_side(raw: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw effective tokens per second, and peak bytes, of each system on each workload."""
    device = raw["benchmark"].removeprefix("side_by_side_")
    speed, memory = ({}, {})
    for work in raw["work"]:
        title = f"{work['model']}: {work['work']}"
        speed[title] = {
            name: statistics.median(t / s for t, s in zip(work["effective_tokens"], seconds, strict=True))
            for name, seconds in work["seconds_by_round"].items()
        }
        memory[title] = {name: peak / 1e9 for name, peak in work["peak_bytes"].items()}
    return {
        f"speed_{device}": _bars(speed, "effective tokens/s (median of rounds)", "{:.0f}"),
        f"bytes_{device}": _bars(memory, "peak GB", "{:.2f}"),
    }


def _bars(panels: Mapping[str, Mapping[str, float]], unit: str, digits: str) -> Figure:
    """Draw a panel for each workload, with a bar for each system and the value at its end."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure, grid = pyplot.subplots(lines, columns, figsize=(5.2 * columns, (0.8 + 0.26 * most) * lines), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, values) in zip(grid.flat, panels.items(), strict=False):
        names = list(values)
        bars = axes.barh(names, list(values.values()), color=[_color(name) for name in names], height=0.72)
        axes.bar_label(bars, [digits.format(value) for value in values.values()], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(title, loc="left")
        axes.set_xlabel(unit)
    figure.tight_layout()
    return figure


def _color(system: str) -> str:
    return _OURS if system == "engine" else _WITHOUT if system.startswith("engine") else _THEIRS


def planner(raw: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw throughput and fusion's savings over the tokens of a microbatch, and the planner with parts switched off."""
    rows = raw["saturation"]["rows"]
    tokens = [row["tokens"] for row in rows]
    figure, rate = pyplot.subplots(figsize=(6.4, 3.2))
    rate.plot(tokens, [row["tokens_per_second"] for row in rows], color=_OURS, marker="o", markersize=3)
    rate.set_xscale("log", base=2)
    rate.set_xticks(tokens, [str(t) for t in tokens], rotation=45)
    rate.set_xlabel("tokens of one microbatch")
    rate.set_ylabel("effective tokens/s", color=_OURS)
    rate.set_ylim(0)
    saved: Axes = rate.twinx()
    saved.plot(tokens, [100 * row["saved"] for row in rows], color="#b5482a", linestyle="--", marker="s", markersize=3)
    saved.set_ylabel("% of time saved by fusing two halves", color="#b5482a")
    saved.set_ylim(0, 100)
    if knee := raw["saturation"].get("knee_tokens"):
        rate.axvline(knee, color="#bbb")
        rate.annotate("knee", (knee, 0), (3, 4), textcoords="offset points")
    panels = {
        f"16 ragged tasks on 4 stages, {load} load (simulated)": {n: s / seconds["all on"] for n, s in seconds.items()}
        for load, seconds in raw["switches"].items()
    }
    off = _bars(panels, "time until each took a step, of all on", "{:.2f}")
    return {"saturation": figure, "switches": off}


_DRAWN: dict[str, Callable[[Mapping[str, Any]], dict[str, Figure]]] = {
    "side_by_side_cpu": side_by_side,
    "side_by_side_cuda": side_by_side,
    "planner": planner,
}


if __name__ == "__main__":
    for benchmark in _DRAWN:
        if (RESULTS / f"{benchmark}.json").exists():
            print(*draw(benchmark), sep="\n")
