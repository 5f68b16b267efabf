"""The planner without a mesh answers as the service does and names errors in a profile or a trace."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from engine.errors import InvalidInputError
from engine.planning.planner import plan
from engine.planning.types import PlannerConfig, Snapshot
from muxtune.v1 import ledger_pb2, plan_pb2, scheduling_pb2, task_pb2
from services.conversion.plan import (
    planner_config_to_domain,
    planner_config_to_proto,
    planning_fields,
    snapshot_task_to_view,
    stored_spec_to_planning,
)
from services.scheduling.ledger_reader import LedgerSnapshot
from services.scheduling.offline_planner import answers, read_profile
from services.scheduling.plan_queries import planner_profile
from tests.services.scheduling.mesh_fakes import BACKBONE, SPEC_OF_TASKS, SchedulingMesh

COST = plan_pb2.CostProfile(fixed_seconds=0.1, token_seconds=0.01)
GENERATED = {"num_tasks": 30, "rate": 0.5, "median_steps": 20.0, "seed": 1}
LINE = {"seconds": 0, "tenant": "a", "steps": 10, "batch": 4, "max_sequence_tokens": 64, "rank": 4, "mean_tokens": 25}


def profile(**fields: Any) -> dict[str, Any]:
    device = plan_pb2.Device(memory_bytes=1 << 30, cost=COST)
    executor = plan_pb2.Executor(name="executors/x", backbone=BACKBONE, device=device)
    recorded = scheduling_pb2.PlannerProfile(executors=[executor], limits=planner_config_to_proto(PlannerConfig(256)))
    return {**MessageToDict(recorded, preserving_proto_field_name=True), **fields}


def hypothetical(name: str = "tenants/b/tasks/new", **fields: Any) -> scheduling_pb2.HypotheticalTask:
    return scheduling_pb2.HypotheticalTask(task=name, spec=SPEC_OF_TASKS, num_train_tokens=100, **fields)


async def test_a_recorded_profile_answers_as_the_mesh_does(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor(cost=COST)
    async with mesh.scheduler() as (scheduler, scheduling):
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans and len(scheduler.plan.explanations) == 1)
        recorded = (await scheduling.GetProfile(scheduling_pb2.GetProfileRequest())).profile
        assert [recorded_task.task for recorded_task in recorded.tasks] == [task]
        assert recorded.executors[0].device.cost == COST
        online = await scheduling.SimulatePlan(scheduling_pb2.SimulatePlanRequest(tasks=[hypothetical()]))
    request = {
        "profile": MessageToDict(recorded, preserving_proto_field_name=True),
        "tasks": [MessageToDict(hypothetical(), preserving_proto_field_name=True)],
    }
    (offline,) = answers(json.loads(json.dumps(request)))
    seconds = {f["task"]: f["seconds_left_with"] for f in offline["forecasts"]}
    assert seconds == pytest.approx({f.task: f.seconds_left_with for f in online.forecasts})
    assert {e["task"] for e in offline["explanations"]} == {e.task for e in online.explanations}


def test_a_profile_has_the_evaluations_of_its_tasks() -> None:
    """A mesh and a recorded profile predict the same end, and a later one for a task that evaluates 1,000 rows."""
    seconds: dict[int, float] = {}
    for num_heldout_rows in (0, 1000):
        estimate = task_pb2.TaskEstimate(num_steps=4, num_train_tokens=100, num_heldout_rows=num_heldout_rows)
        task = task_pb2.Task(name=f"tenants/a/tasks/t{num_heldout_rows}", spec=SPEC_OF_TASKS, estimate=estimate)
        task.spec.training.heldout_fraction, task.spec.training.evaluate_every_steps = 0.5, 1
        stored = ledger_pb2.StoredTaskSpec(spec=task.spec, estimate=estimate)
        planning, limits = stored_spec_to_planning(planning_fields(stored)), PlannerConfig(256)
        entry = ledger_pb2.SnapshotTask(task=task_pb2.Task(name=task.name), executor="executors/x")
        view = snapshot_task_to_view(entry, planning, 0, 0)
        (recorded,) = planner_profile(LedgerSnapshot([entry], specs={task.name: planning}), limits, {})
        fields = MessageToDict(recorded.profile, preserving_proto_field_name=True)["tasks"]
        (answer,) = answers({"profile": profile(tasks=fields)})
        (explanation,) = answer["explanations"]
        executor = read_profile(profile()).snapshot.executors[0]
        online = plan(Snapshot((view,), (executor,)), limits).explanations[0]
        assert explanation["predicted_seconds_left"] == pytest.approx(online.predicted_seconds_left)
        seconds[num_heldout_rows] = explanation["predicted_seconds_left"]
    assert seconds[1000] > 20 * seconds[0]


def test_a_trace_is_simulated_under_three_policies() -> None:
    """One task of 10 steps of 4 sequences of 25 tokens: 10 rounds of a fixed cost and 100 tokens each."""
    (ours, instance, _) = answers({"profile": profile(), "trace": {"lines": [json.dumps(LINE)]}})
    assert (ours["policy"], instance["policy"]) == ("muxtune", "one instance a task")
    assert ours["mean_completion_seconds"] == pytest.approx(10 * (0.1 + 0.01 * 100), rel=0.05)
    assert ours["fairness"] == 1.0 and ours["num_tasks"] == 1
    on_two = [next(answers({"profile": profile(), "trace": GENERATED, "num_devices": n})) for n in (1, 4)]
    assert on_two[0]["num_tasks"] == on_two[1]["num_tasks"] == 30
    assert on_two[1]["mean_completion_seconds"] < on_two[0]["mean_completion_seconds"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "profile.executors"),
        ({"profile": profile(executors=[])}, "profile.executors"),
        ({"profile": profile(limits={"chunk_tokens": 24})}, "24 is neither 0 nor a power of two"),
        ({"profile": profile(), "trace": {"num_tasks": 3, "speed": 2}}, "trace"),
        ({"profile": profile(), "trace": {"lines": ["", "  "]}}, "has no arrival"),
        ({"profile": profile(), "trace": {"lines": ["{}"]}}, "line 1 of the trace: lacks 'seconds'"),
        ({"profile": profile(), "trace": {"lines": ["[1]"]}}, "line 1 of the trace"),
        ({"profile": profile(), "trace": {"lines": [json.dumps(LINE), json.dumps(LINE | {"batch": 0})]}}, "line 2"),
        ({"profile": profile(), "trace": {"lines": [json.dumps(LINE | {"seconds": 1e400})]}}, "line 1"),
        ({"profile": profile(), "trace": GENERATED, "num_devices": 10**6}, "num_devices"),
        ({"profile": profile(), "tasks": [MessageToDict(scheduling_pb2.HypotheticalTask(task="x"))]}, "tasks[0]"),
        ({"profile": profile(), "tasks": [MessageToDict(hypothetical(num_heldout_rows=-1))]}, "num_heldout_rows: -1"),
    ],
)
def test_an_invalid_profile_or_trace_is_named(request_: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        list(answers(request_))
    assert words in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("{", "error: "), ('{"profile": {"executors": 3}}', "error: ")])
def test_the_process_prints_one_error_line(text: str, words: str) -> None:
    command = [sys.executable, "-m", "services.scheduling.offline_planner"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(words) and len(done.stderr.splitlines()) == 1


def test_planner_settings_convert_back() -> None:
    for limits in (
        PlannerConfig(),
        PlannerConfig(512, 16, fuses=False),
        PlannerConfig(64, interleaves=False, preempts=False),
    ):
        assert planner_config_to_domain(planner_config_to_proto(limits)) == limits
    assert planner_config_to_domain(scheduling_pb2.PlannerLimits()) == PlannerConfig()
