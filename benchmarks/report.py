"""Writes a benchmark's figures with their origin: raw figures as JSON in `results/`, a table between markers in
RESULTS.md.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"


def origin(name: str) -> dict[str, Any]:
    """Return the origin that every report states: date, commit, command, machine and versions."""
    return {
        "benchmark": name,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "command": " ".join(["PYTHONPATH=. python", *sys.argv]),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": _versions(),
        "load_average": os.getloadavg(),
    }


def _versions() -> dict[str, str]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return versions | {"trl": metadata.version("trl")} if importlib.util.find_spec("trl") else versions


def describe_origin(report: dict[str, Any]) -> str:
    """Return the origin of a report in a sentence for the page."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"`{report['command']}` (what is measured stands at its top), at commit {report['commit']}. {report['when']},\n"
        f"{report['machine']}, load average {report['load_average'][0]:.1f} at the end; {versions}."
    )


def table(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(report: dict[str, Any], section: str) -> None:
    """Write the raw figures and, on the page, their section."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{report['benchmark']}.json").write_text(json.dumps(report, indent=1) + "\n")
    put_on_page(report["benchmark"], section)


def put_on_page(name: str, section: str) -> None:
    """Put the benchmark's section, which begins with its heading, in place of its former one."""
    opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    page = PAGE.read_text() if PAGE.exists() else "# Results\n\n"
    if opening not in page:
        page = f"{page.rstrip()}\n\n{opening}{closing}"
    before, _, rest = page.partition(opening)
    PAGE.write_text(f"{before}{opening}{section.strip()}\n{closing}{rest.partition(closing)[2]}")


def _commit() -> str:
    """Return the commit, with "-dirty" if the working tree has changes other than benchmarks' results."""
    excluded = [f":(exclude)benchmarks/{name}" for name in (PAGE.name, RESULTS.name, "plots")]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *excluded)
    return (_git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # git is not installed
        return ""


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "cpu")
