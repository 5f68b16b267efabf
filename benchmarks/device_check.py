"""Checks all that needs a GPU, in one call of at most nine minutes, for a machine that is lent for minutes:

    PYTHONPATH=. python3 benchmarks/device_check.py --out FOLDER [--minutes 9] [--commit HASH] [--only A B ...]
    PYTHONPATH=. python3 benchmarks/device_check.py --out FOLDER --second-call     (what is left: side by side)
    PYTHONPATH=. python3 benchmarks/device_check.py --publish FOLDER               (afterwards: results/, RESULTS.md)

It stands on python3 with torch, transformers, peft, cupy, numpy, pytest and hypothesis alone, and on the cubins in
build/kernels (`make kernels`, before). Each stage runs in a process of its own, which is ended when its time is over:
no fault, not even of the device, reaches the next stage. FOLDER gets device_check.json and device_check.md after each.
Without a GPU the stages run with small sizes on the kernels' host launcher, so that the script itself is known to work.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU is asked without starting CUDA here

import torch

from benchmarks import device_stages as stages
from benchmarks import device_timings as timings
from benchmarks.device_setting import Record, Setting, failure

_FORK = multiprocessing.get_context("fork")  # each stage starts with all modules imported, and no CUDA context
_LINES_ON_PAGE = 120  # of one stage


@dataclass(frozen=True)
class Stage:
    """`seconds`: planned; what earlier stages did not use is added. `decides`: what its figures are for."""

    letter: str
    title: str
    seconds: int
    run: Callable[[Setting], Iterator[Record]]
    decides: str


FIRST_CALL = (
    Stage("A", "ceilings", 15, stages.measure_ceilings, "the limits that all figures are compared with"),
    Stage("B", "launches and attributes", 15, stages.launch_all, "whether each kernel loads, launches and is right"),
    Stage("C", "kernels' tests", 110, stages.test_kernels, "whether the kernels are right"),
    Stage("D", "attention, streams, graphs", 45, stages.test_runtime, "whether the engine is right on a GPU"),
    Stage("E", "medians and bytes of each kernel", 60, timings.time_kernels, "where the time of multi_lora goes"),
    Stage("F", "instructions", 25, stages.count_instructions, "whether instructions or bytes bound the kernels"),
    Stage("G", "contenders", 70, timings.compare_contenders, "the default implementation: ours, or grouped_mm"),
    Stage("H", "a layer", 50, timings.time_layer, "the goal: at most 8 % over the frozen layer; bytes kept"),
    Stage("I", "host cost", 20, timings.time_host, "from how many tokens on the host does not hold up the GPU"),
    Stage("J", "equality of bits", 15, stages.compare_bits, "whether beta = 1 keeps a task's bits (docs/adr/0007)"),
    Stage("K", "eight layers of Llama-3-8B", 60, timings.time_model, "how busy the GPU is, and with which kernels"),
    Stage("L", "sanitizer", 40, stages.sanitize, "races and stray accesses that the host launcher cannot see"),
)
SECOND_CALL = (
    Stage("M", "side by side, 7B", 420, stages.compare_side_by_side, "how much faster a user's tasks train"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("device-check"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--commit", help="where the folder is no clone")
    parser.add_argument("--only", nargs="+", metavar="LETTER", help="only these stages")
    parser.add_argument("--second-call", action="store_true", help="the stages that the first call has no time for")
    parser.add_argument("--publish", type=Path, metavar="FOLDER", help="put the results of a run on RESULTS.md")
    parser.add_argument("--launch-once", action="store_true", help=argparse.SUPPRESS)  # what ncu counts
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)  # its letter, its seconds, the file for its records
    options = parser.parse_args(arguments)
    if options.publish:
        return publish(options.publish)
    if options.launch_once:
        stages.launch_once(setting_of(60, None))
        return 0
    if options.stage:
        letter, limit, file = options.stage
        stage = next(stage for stage in (*FIRST_CALL, *SECOND_CALL) if stage.letter == letter)
        _write_records(stage, float(limit), options.commit, Path(file))
        return 0
    listed = SECOND_CALL if options.second_call else FIRST_CALL
    if unknown := set(options.only or ()) - {stage.letter for stage in listed}:
        parser.error(f"--only {', '.join(sorted(unknown))}: there are {', '.join(stage.letter for stage in listed)}")
    chosen = [stage for stage in listed if stage.letter in (options.only or stage.letter)]
    return check(chosen, options.out, 60 * options.minutes, options.commit)


def check(chosen: Sequence[Stage], out: Path, seconds: float, commit: str | None) -> int:
    """Run the stages one by one and write the results after each. Return 1 if one failed or had no time, else 0."""
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + seconds
    report: dict[str, Any] = {"command": " ".join(["python3", *sys.argv]), "stages": []}
    for number, stage in enumerate(chosen):
        later = sum(other.seconds for other in chosen[number + 1 :])
        limit = ends - time.monotonic() - later
        print(f"{stage.letter} {stage.title}: {limit:.0f} s at most", flush=True)
        started = time.monotonic()
        records, ending = run_stage(stage, limit, commit)
        taken = time.monotonic() - started
        report["stages"].append({
            "letter": stage.letter, "title": stage.title, "decides": stage.decides, "seconds": round(taken, 1),
            "ending": ending, "records": records,
        })  # fmt: skip
        (out / "device_check.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "device_check.md").write_text(page(report))
        print(f"{stage.letter} {ending} after {taken:.0f} s", flush=True)
    print(page(report), flush=True)
    return 0 if all(stage["ending"] == "done" for stage in report["stages"]) else 1


def run_stage(stage: Stage, limit: float, commit: str | None) -> tuple[list[Record], str]:
    """Run one stage in its own process. Return its records and how it ended: done, failed, out of time or killed."""
    if limit < min(5, stage.seconds):
        return [], "not run: no time left"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records"
        file.touch()
        process = _FORK.Process(target=_run_forked, args=(stage, limit, commit, file))
        process.start()
        process.join(limit)
        is_late = process.is_alive()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind too
        process.join()
        lines = file.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut off
    if is_late:
        return records, f"out of time after {limit:.0f} s"
    if process.exitcode and process.exitcode < 0:
        return records, f"killed by {signal.Signals(-process.exitcode).name}"
    return records, "failed" if any("error" in record for record in records) else "done"


def _run_forked(stage: Stage, limit: float, commit: str | None, file: Path) -> None:
    os.setsid()
    if torch.cuda._is_in_bad_fork():  # an import has started CUDA: this process must begin anew
        own = [] if commit is None else ["--commit", commit]
        os.execv(sys.executable, [sys.executable, __file__, "--stage", stage.letter, str(limit), str(file), *own])
    _write_records(stage, limit, commit, file)


def _write_records(stage: Stage, limit: float, commit: str | None, file: Path) -> None:
    with file.open("a", buffering=1) as lines:

        def write(record: Record) -> None:
            lines.write(json.dumps(record, default=str) + "\n")
            if record.get("line"):
                print(f"  {record['line']}", flush=True)

        try:
            for record in stage.run(setting_of(limit, commit)):
                write(record)
        except BaseException as error:
            write(failure(stage.title, error) | {"traceback": traceback.format_exc()[-4000:]})


def setting_of(seconds: float, commit: str | None) -> Setting:
    """Return the setting of a stage: this machine's GPU, or the host launcher."""
    started = time.monotonic()
    if torch.cuda.is_available():
        from engine.kernels.cupy_launcher import launcher_of

        device = torch.device("cuda", 0)
        return Setting(device, launcher_of(device), False, seconds, started, commit)
    from tests.engine.kernels.host.launcher import HostLauncher

    folder = Path(os.environ.get("MUXTUNE_HOST_KERNELS") or Path(tempfile.gettempdir()) / "muxtune-host-kernels")
    folder.mkdir(exist_ok=True)
    return Setting(torch.device("cpu"), HostLauncher(folder), True, seconds, started, commit)


def page(report: dict[str, Any]) -> str:
    """Return the results as Markdown: a table of the stages, then what each measured."""
    rows = [["stage", "ended", "seconds", "decides"], ["---"] * 4]
    for stage in report["stages"]:
        rows.append([f"{stage['letter']} {stage['title']}", stage["ending"], str(stage["seconds"]), stage["decides"]])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    parts = [f"`{report['command']}`", *_origin(report), table]
    for stage in report["stages"]:
        lines = [line for record in stage["records"] for line in record.get("line", "").splitlines() if line.strip()]
        left_out = [f"... and {len(lines) - _LINES_ON_PAGE} more in the JSON"] if len(lines) > _LINES_ON_PAGE else []
        shown = "\n".join([*lines[:_LINES_ON_PAGE], *left_out])
        parts.append(f"### {stage['letter']} {stage['title']}\n\n```\n{shown}\n```")
    return "\n\n".join(parts) + "\n"


def _origin(report: dict[str, Any]) -> list[str]:
    records = [record for stage in report["stages"] for record in stage["records"]]
    where = next((record["environment"] for record in records if "environment" in record), None)
    if where is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    return [f"On {where['device']} (driver {where['driver']}), {versions}, commit {where['commit']}, {where['date']}."]


def publish(folder: Path) -> int:
    """Copy the results of a run on a GPU into benchmarks/results, and its page into RESULTS.md."""
    from benchmarks import report as results

    report = json.loads((folder / "device_check.json").read_text())
    letters = {stage["letter"] for stage in report["stages"]}
    name = "device_check_2" if letters <= {stage.letter for stage in SECOND_CALL} else "device_check"
    (results.RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    heading = "## On a GPU" + (": side by side" if name.endswith("2") else "")
    results.put_on_page(name, f"{heading}\n\n{page(report)}\nRaw figures: `results/{name}.json`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
