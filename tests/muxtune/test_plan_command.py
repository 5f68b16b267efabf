"""`muxtune plan` against a scheduling service that the test plays, and without any, on recorded profiles."""

import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.json_format import MessageToDict
from typer.testing import CliRunner, Result

from muxtune.cli.main import app
from muxtune.cli.spec import read_settings, read_spec
from muxtune.errors import InvalidInputError
from muxtune.v1 import plan_pb2, scheduling_pb2, scheduling_pb2_grpc, task_pb2
from tests.certificates import ca_folder, certificates

TASK, OWN, OTHERS = "tenants/a/tasks/t", "tenants/a/tasks/u", ("tenants/b/tasks/v", "tenants/c/tasks/w")
EXPLANATION = plan_pb2.TaskExplanation(
    task=TASK, executor="executors/x", neighbours=[OWN, *OTHERS], num_neighbours=3, reason="stays where it runs",
    predicted_bytes=5_000_000, alone_bytes=2_000_000_000, predicted_seconds_left=90.0,
    round_seconds=2.0, alone_round_seconds=0.5,
    predicted_step_seconds=0.4, measured_step_seconds=0.44, padding_fraction=0.031, predicted_padding_fraction=0.02,
    misses_deadline=True,
)  # fmt: skip
PROFILE = scheduling_pb2.PlannerProfile(
    executors=[
        plan_pb2.Executor(
            name="executors/x",
            backbone=plan_pb2.Backbone(
                name="tiny", num_layers=1, hidden_size=8, vocab_size=64, max_sequence_tokens=64, weight_bytes=4000,
                dtype="float32",
                adaptable_modules=[plan_pb2.AdaptableModule(name="q_proj", in_features=8, out_features=8)],
            ),
            device=plan_pb2.Device(
                memory_bytes=1 << 30, cost=plan_pb2.CostProfile(fixed_seconds=0.1, token_seconds=0.01)
            ),
        )
    ]
)  # fmt: skip
SPEC = {
    "backbone": "tiny",
    "lora": {"rank": 2, "target_modules": ["q_proj"]},
    "training": {"learning_rate": 0.1, "num_steps": 10, "global_batch_size": 4, "max_sequence_tokens": 50},
}


class Scheduling(scheduling_pb2_grpc.SchedulingServiceServicer):
    def ExplainPlan(self, request: Any, context: Any) -> scheduling_pb2.ExplainPlanResponse:
        if request.task != TASK:
            waits = plan_pb2.TaskExplanation(task=request.task, reason="waits for memory")
            return scheduling_pb2.ExplainPlanResponse(explanation=waits)
        htask = plan_pb2.HTask(tasks=[TASK, OWN, *OTHERS], token_budget=2048, chunk_tokens=32)
        return scheduling_pb2.ExplainPlanResponse(explanation=EXPLANATION, htask=htask, timeline_svg="<svg/>")

    def GetPlan(self, request: Any, context: Any) -> scheduling_pb2.GetPlanResponse:
        return scheduling_pb2.GetPlanResponse(version=1, explanations=[EXPLANATION])

    def GetProfile(self, request: Any, context: Any) -> scheduling_pb2.GetProfileResponse:
        return scheduling_pb2.GetProfileResponse(profile=PROFILE)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    scheduling_pb2_grpc.add_SchedulingServiceServicer_to_server(Scheduling(), server)
    port = server.add_secure_port("127.0.0.1:0", certificates("scheduling").for_server(is_mutual=True))
    monkeypatch.setenv("MUXTUNE_SCHEDULING_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("MUXTUNE_CERTS", str(ca_folder() / "operator"))
    monkeypatch.chdir(tmp_path)
    server.start()
    yield
    server.stop(None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def written(folder: Path, **fields: Any) -> str:
    path = folder / "new.yaml"
    path.write_text(yaml.safe_dump({**SPEC, **fields}))
    return str(path)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(MessageToDict(PROFILE, preserving_proto_field_name=True)))
    return str(path)


def test_a_task_is_explained_and_other_tenants_are_only_counted(mesh: None) -> None:
    shown = run("explain", TASK)
    assert shown.exit_code == 0, shown.output
    for words in (
        f"{OWN}, 2 of other tenants", "stays where it runs", "predicted 0.4 s, measured 0.44 s",
        "2 s, alone it would be 0.5 s", "adds 5 MB", "2 GB", "predicted 2.0%, so far 3.1%",
        "90 s, after its deadline", "chunks of 32",
    ):  # fmt: skip
        assert words in shown.output
    assert not any(other in shown.output for other in OTHERS)
    waits = run("explain", "tenants/a/tasks/late")
    assert "waits for memory" in waits.output and "beside" not in waits.output
    assert json.loads(run("explain", TASK, "--json").output)["htask"]["chunk_tokens"] == 32


def test_a_timeline_is_a_file(mesh: None, tmp_path: Path) -> None:
    assert run("timeline", "-o", str(tmp_path / "plan.svg")).exit_code == 0
    assert (tmp_path / "plan.svg").read_text() == "<svg/>"
    none = run("timeline", "-o", str(tmp_path / "none.svg"), "--executor", "executors/none")
    assert none.exit_code == 1 and not (tmp_path / "none.svg").exists()


def test_a_recorded_profile_answers_whatif_later_without_a_mesh(mesh: None, tmp_path: Path) -> None:
    recorded = tmp_path / "recorded.json"
    recorded.write_text(run("profile").output)
    shown = run("whatif", written(tmp_path), "--profile", str(recorded), "--mean-tokens", "20", "--json")
    assert shown.exit_code == 0, shown.output
    (forecast,) = json.loads(shown.output)["forecasts"]
    assert forecast["task"] == "tenants/whatif/tasks/whatif-new"
    assert forecast["seconds_left_with"] == pytest.approx(10 * (0.1 + 0.01 * 4 * 20), rel=0.15)
    assert "whatif-new" in run("whatif", written(tmp_path), "--profile", str(recorded)).output


def test_a_trace_made_or_read_is_simulated(profile: str, tmp_path: Path) -> None:
    generated = run("simulate", "--generate", "20", "--steps", "5", "--profile", profile, "--devices", "2", "--json")
    assert generated.exit_code == 0, generated.output
    rows = [json.loads(line) for line in generated.output.splitlines()]
    assert [row["policy"] for row in rows] == ["muxtune", "one instance a task", "batch everything"]
    assert all(row["num_tasks"] == 20 for row in rows)
    trace = tmp_path / "trace.jsonl"
    line = {"seconds": 0, "tenant": "a", "steps": 10, "batch": 4, "max_sequence_tokens": 64, "rank": 4}
    trace.write_text("\n".join([json.dumps(line), "", json.dumps(line | {"seconds": 3})]))
    replayed = run("simulate", "--trace", str(trace), "--profile", profile)
    assert replayed.exit_code == 0 and "muxtune: 2 tasks in " in replayed.output


def test_an_error_is_one_line_and_exit_status_one(profile: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"seconds": 1}')
    spec = written(tmp_path)
    no_steps = tmp_path / "no_steps.yaml"
    no_steps.write_text(yaml.safe_dump({**SPEC, "training": {"num_epochs": 1}}))
    for arguments, words in (
        (("simulate", "--profile", profile), "either --trace FILE or --generate NUMBER"),
        (("simulate", "--generate", "3", "--profile", str(broken)), "is not JSON"),
        (("simulate", "--trace", str(trace), "--profile", profile), "line 1 of the trace: lacks 'steps'"),
        (("whatif", spec, "--profile", str(tmp_path / "none.json")), "cannot be read"),
        (("whatif", str(no_steps), "--profile", profile), "training.num_steps"),
        (("whatif", written(tmp_path, lora={"rank": -1}), "--profile", profile), "tasks[0]"),
    ):
        shown = run(*arguments)
        assert shown.exit_code == 1 and words in shown.output, (arguments, shown.output)
        assert shown.output.startswith("error: ") and "Traceback" not in shown.output


@pytest.mark.parametrize(
    "text", ["2026-12-01T10:00:00Z", '"2026-12-01T10:00:00Z"', "2026-12-01 12:00:00+02:00", "2026-12-01 10:00:00"]
)
def test_a_deadline_needs_no_quotes(text: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(f"backbone: b\nlabels: {{since: 2026-01-01}}\ndeadline: {text}\n")
    read = read_spec(file)
    assert read.deadline.ToJsonString() == "2026-12-01T10:00:00Z" and read.labels["since"] == "2026-01-01"
    assert read_spec(None, read_settings([f"deadline={text}"])) == task_pb2.TaskSpec(deadline=read.deadline)


@pytest.mark.parametrize("text", ["2026-12-01", "soon", "2026-13-01T10:00:00Z"])
def test_an_invalid_deadline_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(f"deadline: {text}\n")
    with pytest.raises(InvalidInputError, match="deadline"):
        read_spec(file)
