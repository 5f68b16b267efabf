"""The check for a lent GPU runs from end to end on this CPU, and no fault of one stage reaches the next."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import device_check
from benchmarks.device_check import FIRST_CALL, SECOND_CALL, Stage, check
from benchmarks.device_setting import Record, Setting
from benchmarks.device_stages import counts_of
from benchmarks.device_timings import launches_of
from benchmarks.kernel_timing import ROOT

ABSENT = (
    "grpc",
    "obstore",
    "opentelemetry",
    "sqlalchemy",
    "alembic",
    "cryptography",
    "google",
    "typer",
    "gguf",
    "matplotlib",
)
"""Packages that a lent machine need not have."""


@pytest.fixture
def run_script(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the script where ABSENT cannot be imported, and returns its stages by letter."""
    for name in ABSENT:
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name} here')\n")
    kernels = request.config.cache.mkdir("muxtune-kernels")  # type: ignore[union-attr]
    paths = {"PYTHONPATH": f"{tmp_path / 'absent'}:{ROOT}", "MUXTUNE_HOST_KERNELS": str(kernels)}

    def run(*options: str) -> dict[str, Any]:
        command = [sys.executable, "benchmarks/device_check.py", "--out", str(tmp_path), *options]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        report = json.loads((tmp_path / "device_check.json").read_text())
        return {stage["letter"]: stage for stage in report["stages"]}

    return run


@pytest.mark.thorough
def test_every_stage_runs_here_with_nothing_but_its_packages(
    run_script: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    stages = run_script()
    assert {letter: stage["ending"] for letter, stage in stages.items()} == dict.fromkeys("ABCDEFGHIJKL", "done")
    assert all(record["line"] for record in stages["B"]["records"]) and len(stages["B"]["records"]) == 7
    for letter, least in (("C", 100), ("D", 15)):  # collected here, run on a GPU
        assert int(stages[letter]["records"][-1]["line"].split(" skipped")[0].split()[-1]) >= least
    times = stages["G"]["records"][0]["point"]["times"]
    assert {"frozen", "ours", "cublas", "grouped_mm", "peft"} <= times.keys()
    page = (tmp_path / "device_check.md").read_text()
    assert all(f"### {letter} " in page for letter in stages) and "| A ceilings | done |" in page


def test_the_second_call_starts_with_nothing_but_its_packages(run_script: Callable[..., dict[str, Any]]) -> None:
    stages = run_script("--second-call")
    assert stages["M"]["ending"] == "done" and "needs a CUDA device" in stages["M"]["records"][0]["line"]


def test_the_first_call_is_planned_within_nine_minutes() -> None:
    assert sum(stage.seconds for stage in FIRST_CALL) <= 9 * 60 - 10
    assert sum(stage.seconds for stage in SECOND_CALL) <= 9 * 60 - 10
    letters = [stage.letter for stage in (*FIRST_CALL, *SECOND_CALL)]
    assert len(set(letters)) == len(letters)


def stage_of(letter: str, run: Callable[[Setting], Iterator[Record]], seconds: int = 20) -> Stage:
    return Stage(letter, f"stage {letter}", seconds, run, "nothing")


def works(setting: Setting) -> Iterator[Record]:
    yield {"remaining": setting.remaining, "line": "it works"}


def raises(setting: Setting) -> Iterator[Record]:
    yield {"line": "first"}
    raise ValueError("then this")


def dies(setting: Setting) -> Iterator[Record]:
    yield {"line": "before"}
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(setting: Setting) -> Iterator[Record]:
    child = subprocess.Popen(["sleep", "600"])
    yield {"pid": child.pid, "line": "it hangs"}
    time.sleep(600)


@pytest.fixture(autouse=True)
def cuda_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have started CUDA; the script itself has not when it forks."""
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: False)


def run_all(folder: Path, stages: list[Stage], seconds: float) -> tuple[int, list[dict[str, Any]]]:
    status = check(stages, folder, seconds, "abc")
    return status, json.loads((folder / "device_check.json").read_text())["stages"]


def test_a_fault_of_one_stage_does_not_reach_the_next(tmp_path: Path) -> None:
    stages = [stage_of("A", raises), stage_of("B", dies), stage_of("C", works)]
    status, results = run_all(tmp_path, stages, 100)
    assert status == 1
    assert [stage["ending"] for stage in results] == ["failed", "killed by SIGKILL", "done"]
    assert [record["line"] for record in results[0]["records"]] == ["first", "stage A: ValueError: then this"]
    assert "raise ValueError" in results[0]["records"][1]["traceback"]
    assert results[1]["records"] == [{"line": "before"}]
    assert run_all(tmp_path, [stage_of("A", works)], 100)[0] == 0


def test_a_stage_ends_in_time_with_what_it_started_and_leaves_the_others_theirs(tmp_path: Path) -> None:
    started = time.monotonic()
    status, results = run_all(tmp_path, [stage_of("A", hangs, 3), stage_of("B", works, 30)], 34)
    assert status == 1 and time.monotonic() - started < 30
    assert results[0]["ending"].startswith("out of time") and results[1]["ending"] == "done"
    assert results[1]["records"][0]["remaining"] > 20
    with pytest.raises(ProcessLookupError):
        while True:  # the system takes a moment to end it
            os.kill(results[0]["records"][0]["pid"], 0)
            stat = Path(f"/proc/{results[0]['records'][0]['pid']}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "Z":  # ended, and not yet waited for by init
                raise ProcessLookupError


def test_a_stage_without_time_is_not_run(tmp_path: Path) -> None:
    status, results = run_all(tmp_path, [stage_of("A", works, 100), stage_of("B", works, 1)], 3)
    assert status == 1 and results[0]["ending"] == "not run: no time left"


def test_stages_are_chosen_by_letter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        device_check.main(["--only", "A", "Z"])
    assert "--only Z: there are A, B, C" in capsys.readouterr().err


def test_counts_are_read_from_among_other_output() -> None:
    text = """==PROF== Connected to process 7
some line of the program
"ID","Process ID","Process Name","Kernel Name","Context","Metric Name","Metric Unit","Metric Value"
"0","7","python3","multi_lora_shrink_bf16(Launch)","1","dram__bytes.sum","Mbyte","134.5"
"0","7","python3","multi_lora_shrink_bf16(Launch)","1","smsp__inst_executed.sum","inst","55,000,000"
"1","7","python3","multi_lora_expand_bf16(Launch)","1","dram__bytes.sum","Mbyte","140.0"
==PROF== Disconnected
"""
    assert counts_of(text) == [
        ("multi_lora_shrink_bf16", {"dram__bytes.sum": "134.5 Mbyte", "smsp__inst_executed.sum": "55,000,000 inst"}),
        ("multi_lora_expand_bf16", {"dram__bytes.sum": "140.0 Mbyte"}),
    ]
    assert counts_of("==ERROR== The user does not have permission") == []


def test_launches_are_named_by_what_they_do() -> None:
    from benchmarks.bench_multi_lora import Point

    point = Point("p", ((4, (6, 2)),), 10, 2, (8, 64))
    names = ["shrink", "expand", "shrink_outer", "shrink", "outer", "outer", "expand"]
    launches = launches_of(point, [f"{i} multi_lora_{name}_bf16" for i, name in enumerate(names)], False)
    assert launches == [
        ("S from X (shrink)", 80), ("Y added to (expand)", 320), ("E and dB from dY (shrink_outer)", 160),
        ("E from dY (shrink)", 160), ("dB from dY (outer)", 160), ("dA from X (outer)", 80),
        ("dX written (expand)", 80),
    ]  # fmt: skip
