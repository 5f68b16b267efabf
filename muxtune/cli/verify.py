"""`muxtune verify`: shows on this machine that a tenant gets the adapter it would have got alone.

The engine runs in a subprocess, so that the command itself needs no torch.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from muxtune.child_process import child_command
from muxtune.cli.terminal import console, error_console, table


def run_verification(steps: int, methods: str, backbone: Path | None, as_json: bool) -> int:
    """Print the worst differences of each method. Returns the exit status: 0 if all are within the goals."""
    command = child_command("engine.verification", "--steps", str(steps))
    command += ["--methods", methods] if methods else []
    command += ["--backbone", str(backbone)] if backbone else []
    findings: list[dict[str, Any]] = []
    with (
        error_console.status("training all methods in one batch") as status,  # on a terminal only
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if as_json:
                print(line, end="", flush=True)
            findings.append(finding := json.loads(line))
            if "options" in finding:
                status.update(f"{finding['options']}: {finding['method']} compared with {finding['against']}")
        process.wait()
        errors.seek(0)
        error_console.print(errors.read(), end="")
    is_whole = bool(findings) and "verified" in findings[-1]
    if not as_json and is_whole:
        for finding in (finding for finding in findings if "left_out" in finding):
            console.print(f"{finding['left_out']} is left out: {finding['reason']}")
        _show([finding for finding in findings if "method" in finding], steps)
    return process.returncode or int(not is_whole)


def _show(findings: list[dict[str, Any]], steps: int) -> None:
    """Print a line per method: its worst differences from the reference, and from this engine without neighbours."""
    title = f"All methods in one batch, {steps} steps, float32: worst differences from each alone"
    header = ("method", "against", "losses", "weights", "rounding", "losses*", "weights*", "ok")
    rows = []
    for method in dict.fromkeys(finding["method"] for finding in findings):
        of_method = [finding for finding in findings if finding["method"] == method]
        against_reference = [finding for finding in of_method if finding["own_rounding"] is not None]
        against_engine = [finding for finding in of_method if finding["own_rounding"] is None]
        columns = [_worst(against_reference, key) for key in ("loss_difference", "weight_difference", "own_rounding")]
        columns += [_worst(against_engine, key) for key in ("loss_difference", "weight_difference")]
        holds = "yes" if all(finding["holds"] for finding in of_method) else "NO"
        rows.append((method, against_reference[0]["against"].removesuffix(" alone"), *columns, holds))
    table(title, header, rows)
    num_options = len({finding["options"] for finding in findings})
    console.print(
        f"Worst of {num_options} combinations of optimizer, accumulation and schedule. Goals: losses of every step\n"
        "within 1e-5 (relative), final weights within 1e-4. Rounding: the reference's losses against its own run in\n"
        "float64; no smaller difference means anything. *: against this engine with each task alone."
    )
    failed = [f"{f['method']} ({f['options']}, against {f['against']})" for f in findings if not f["holds"]]
    console.print(
        "verified" if not failed else f"NOT verified: {'; '.join(failed)}", style="red" if failed else "green"
    )


def _worst(findings: list[dict[str, Any]], key: str) -> str:
    return f"{max(finding[key] for finding in findings):.1e}"
