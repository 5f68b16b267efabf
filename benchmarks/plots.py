"""Pictures of side_by_side.py's figures, as SVG and PNG beside the raw ones.

PYTHONPATH=. python benchmarks/plots.py [cpu | cuda]
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import report, side_by_side

INK, OWN, PEER, ABLATED = "#333333", "#0b6e4f", "#9aa5b1", "#c9a227"


def main() -> None:
    for device in sys.argv[1:] or ("cpu", "cuda"):
        raw = report.RESULTS / f"side_by_side_{device}.json"
        if raw.exists():
            draw(json.loads(raw.read_text()), report.RESULTS)


def draw(raw: Mapping[str, Any], folder: Path) -> list[Path]:
    """One panel a workload: effective tokens per second of each system, with quartiles. What was written."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "muxtune"  # equal figures give equal files
    from matplotlib import pyplot

    num_columns = min(3, len(raw["work"]))
    num_rows = -(-len(raw["work"]) // num_columns)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(5 * num_columns, 2.6 * num_rows), squeeze=False)
    for axis in axes.flat[len(raw["work"]) :]:
        axis.remove()
    for axis, work in zip(axes.flat, raw["work"], strict=False):
        _panel(axis, work)
    figure.tight_layout()
    written = [folder / f"{raw['benchmark']}.{kind}" for kind in ("svg", "png")]
    for path in written:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return written


def _panel(axis: Any, work: Mapping[str, Any]) -> None:
    rows = side_by_side.summary(work)[::-1]
    rates = [row["rate"] for row in rows]
    spread = [[row["rate"] - row["low"] for row in rows], [row["high"] - row["rate"] for row in rows]]
    names = [row["system"] for row in rows]
    colours = [OWN if n == "engine" else ABLATED if n in side_by_side.ABLATIONS else PEER for n in names]
    axis.barh(names, rates, xerr=spread, color=colours, error_kw={"ecolor": INK, "elinewidth": 1})
    for i, row in enumerate(rows):
        if row["system"] != "engine":
            axis.annotate(f" ÷{row['ratio']:.2f}", (row["high"], i), va="center", fontsize=8, color=INK)
    axis.set_title(f"{work['model']}: {work['work']}", fontsize=9)
    axis.set_xlabel("effective tokens/s", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
