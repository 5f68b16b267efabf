"""Runs the planner without a mesh: the mesh's own code, `services.scheduling.offline_planner`, as a subprocess."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict

from muxtune.child_process import child_command
from muxtune.errors import InvalidInputError
from muxtune.v1 import scheduling_pb2


def whatif(profile: Path, tasks: list[scheduling_pb2.HypotheticalTask]) -> scheduling_pb2.SimulatePlanResponse:
    """Return what SchedulingService.SimulatePlan would answer. Raises InvalidInputError."""
    fields = [MessageToDict(task, preserving_proto_field_name=True) for task in tasks]
    (answer,) = _answers({"profile": read_profile(profile), "tasks": fields})
    return ParseDict(answer, scheduling_pb2.SimulatePlanResponse())


def simulate(profile: dict[str, Any], trace: dict[str, Any], num_devices: int) -> Iterator[dict[str, Any]]:
    """Yield a summary for each policy. Raises InvalidInputError."""
    yield from _answers({"profile": profile, "trace": trace, "num_devices": num_devices})


def format_summary(row: dict[str, Any]) -> str:
    """Return a policy's summary as text."""
    left_out = f", {row['num_never_placed']} fit on no executor" if row["num_never_placed"] else ""
    mean, median, most = (row[f"{name}_completion_seconds"] for name in ("mean", "median", "p95"))
    return (
        f"{row['policy']}: {row['num_tasks']} tasks in {row['seconds']:.0f} s{left_out}, "
        f"{row['effective_tokens_per_second']:.0f} effective tokens/s\n"
        f"  done after {mean:.0f} s on average, {median:.0f} s median, {most:.0f} s for 95 %; "
        f"{row['mean_slowdown']:.2f} times as long as alone\n"
        f"  fairness {row['fairness']:.2f}, {row['num_plans']} plans, {row['num_evictions']} tasks moved"
    )


def read_profile(path: Path) -> dict[str, Any]:
    """Return a recorded profile. Raises InvalidInputError."""
    try:
        fields = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}: is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{path}: is not a profile: record one with `muxtune plan profile`")
    return fields


def read_text(path: Path) -> str:
    """Return a file's text. Raises InvalidInputError."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read: {error}") from error


def _answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    command = child_command("services.scheduling.offline_planner")
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [
            f"the planner ended with status {done.returncode} and no message"
        ]
        raise InvalidInputError(last[0].removeprefix("error: "))
    return [json.loads(line) for line in done.stdout.splitlines()]
