"""Measures the worst differences of fused training by method, as `muxtune verify` does, and writes them to RESULTS.md.

    PYTHONPATH=. python benchmarks/parity.py [--steps 50] [--backbone FOLDER]

All methods train in one batch, in float32, under {AdamW, SGD} x {accumulation 1, 4} x {constant, cosine with warm-up},
on rows of many lengths. Each is compared with HF PEFT training it alone (plain torch if PEFT lacks the method) and with
this engine training it alone. "Its own rounding" compares the reference's losses with those of its run in float64.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks import report
from engine.verification.__main__ import load_model, silence_libraries
from engine.verification.cases import METHODS
from engine.verification.report import LOSS_GOAL, WEIGHT_GOAL, compare, unsupported_methods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--backbone", type=Path)
    arguments = parser.parse_args()
    silence_libraries()
    model = load_model(arguments.backbone)
    missing = {each.method for each in unsupported_methods(model, list(METHODS))}
    names = [name for name in METHODS if name not in missing]
    findings = [dataclasses.asdict(f) | {"holds": f.holds} for f in compare(model, names, arguments.steps)]
    raw = report.origin("parity") | {"num_steps": arguments.steps, "findings": findings}
    report.write(raw, section(raw))


def section(raw: dict[str, Any]) -> str:
    num_options = len({finding["options"] for finding in raw["findings"]})
    header = [
        "method",
        "reference",
        "losses",
        "weights",
        "its own rounding",
        "losses, no neighbours",
        "weights",
        "holds",
    ]
    rows = []
    for method in dict.fromkeys(finding["method"] for finding in raw["findings"]):
        findings = [f for f in raw["findings"] if f["method"] == method]
        outside = [f for f in findings if f["against"] != "muxtune alone"]
        alone = [f for f in findings if f["against"] == "muxtune alone"]
        columns = [worst(outside, "loss_difference"), worst(outside, "weight_difference")]
        columns += [worst(outside, "own_rounding"), worst(alone, "loss_difference"), worst(alone, "weight_difference")]
        rows.append([method, outside[0]["against"], *columns, "yes" if all(f["holds"] for f in findings) else "NO"])
    return f"""
## Parity: every method in one batch against each alone, {raw["num_steps"]} steps

{report.describe_origin(raw)}
Worst of every step and of {num_options} combinations of optimizer, accumulation and schedule; losses relative,
weights absolute. Goals: {LOSS_GOAL:g} and {WEIGHT_GOAL:g}.

{report.table(header, rows)}

Raw figures: `results/parity.json`.
"""


def worst(findings: list[dict[str, Any]], key: str) -> str:
    return f"{max(finding[key] for finding in findings):.1e}"


if __name__ == "__main__":
    main()
