"""`muxtune verify`: the proof that a tenant gets the adapter it would have got alone, on this machine.

The engine's report runs in a process of its own, so that the command needs no torch.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from muxtune.cli.context import console, table


def run_verification(steps: int, methods: str, backbone: Path | None, as_json: bool) -> int:
    """Prints the worst of each method; the exit status of the report: 0 if all holds."""
    command = [sys.executable, "-m", "engine.verification", "--steps", str(steps)]
    command += ["--methods", methods] if methods else []
    command += ["--backbone", str(backbone)] if backbone else []
    findings: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if as_json:
                print(line, end="", flush=True)
            findings.append(json.loads(line))
    is_whole = bool(findings) and "verified" in findings[-1]
    if not as_json and is_whole:
        _show(findings[:-1], steps)
    return process.returncode or int(not is_whole)


def _show(findings: list[dict[str, Any]], steps: int) -> None:
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for finding in findings:
        row = worst.setdefault((finding["method"], finding["against"]), dict(finding, num_options=0))
        row["num_options"] += 1
        row["holds"] = row["holds"] and finding["holds"]
        for key in ("loss_difference", "weight_difference", "own_rounding"):
            row[key] = None if row[key] is None else max(row[key], finding[key])
    rows = (
        (method, against, row["num_options"], f"{row['loss_difference']:.1e}", f"{row['weight_difference']:.1e}",
         "" if row["own_rounding"] is None else f"{row['own_rounding']:.1e}", "yes" if row["holds"] else "NO")
        for (method, against), row in worst.items()
    )  # fmt: skip
    title = f"All methods in one batch, {steps} steps of each, float32, against each"
    table(title, ("method", "against", "options", "loss (relative)", "weights", "its own rounding", "holds"), rows)
    console.print(
        "Goals: losses of every step within 1e-5, final weights within 1e-4. Options: optimizer, accumulation,\n"
        "schedule. Worst differences are shown. Its own rounding: the reference's losses against its own in float64;\n"
        "no difference can be told below that."
    )
    odd = [f"{f['method']} ({f['options']}, against {f['against']})" for f in findings if not f["holds"]]
    console.print("verified" if not odd else f"NOT verified: {'; '.join(odd)}", style="red" if odd else "green")
