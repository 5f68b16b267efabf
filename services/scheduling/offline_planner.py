"""Runs the planner without a mesh on a recorded profile.

Usage: `python -m services.scheduling.offline_planner < REQUEST.json`. The request is one JSON object.
Answers are JSON, one a line; an error is one line on stderr with exit status 1.

    {"profile": PlannerProfile, "tasks": [HypotheticalTask, ...]}     one answer, as SimulatePlan's
    {"profile": PlannerProfile, "trace": TRACE, "num_devices": 128}   a summary for each policy on that many executors

TRACE is {"lines": [...]}, as `engine.planning.simulation.arrival_trace.read` has them, or the fields of
`engine.planning.simulation.arrival_trace.TraceParameters`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from engine.errors import InvalidInputError
from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.placement.eta import seconds_alone
from engine.planning.simulation.arrival_trace import TraceParameters, arrivals, read
from engine.planning.simulation.baselines import PaddedBatching, PlannerPolicy, SeparateInstances
from engine.planning.simulation.simulator import Arrival, SchedulingPolicy, simulate
from engine.planning.simulation.summary import summarise
from engine.planning.types import ExecutorView, PlannerConfig, Snapshot, TaskView
from muxtune.v1 import scheduling_pb2 as pb
from services.conversion.plan import executor_to_view, planner_config_to_domain
from services.conversion.task import spec_to_domain
from services.resource_names import executor_name, tenant_name, tenant_of
from services.scheduling.plan_queries import hypothetical_tasks, what_if

MAX_DEVICES = 4096
_TRACE_TARGET_MODULES = ("all-linear",)  # of tasks in a trace; every backbone has them
_NUM_PLANS = 2000  # during a trace; changes that are closer together share one plan


@dataclass(frozen=True)
class PlannerInputs:
    snapshot: Snapshot
    limits: PlannerConfig


def main() -> int:
    try:
        for answer in answers(json.load(sys.stdin)):
            print(json.dumps(answer), flush=True)
    except (InvalidInputError, json.JSONDecodeError, json_format.ParseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def answers(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the answers to a request. Raises InvalidInputError or ParseError."""
    profile = read_profile(request.get("profile", {}))
    if "trace" in request:
        yield from simulate_trace(profile, request["trace"], int(request.get("num_devices", 0)))
        return
    query = json_format.ParseDict({"tasks": request.get("tasks", [])}, pb.SimulatePlanRequest())
    response = pb.SimulatePlanResponse()
    for page in what_if(profile.snapshot, profile.limits, hypothetical_tasks(query, profile.snapshot)):
        response.MergeFrom(page)
    yield json_format.MessageToDict(response, preserving_proto_field_name=True)


def read_profile(fields: dict[str, Any]) -> PlannerInputs:
    """Return the planner's inputs from a recorded profile. Raises InvalidInputError or ParseError."""
    recorded = json_format.ParseDict(fields, pb.PlannerProfile())
    executors = tuple(executor_to_view(executor) for executor in recorded.executors)
    if not executors:
        raise InvalidInputError.of_field(
            "profile.executors", "is empty; run `muxtune plan profile` while an executor is running"
        )
    tasks = tuple(_resident(task, age) for age, task in enumerate(recorded.tasks))
    snapshot = Snapshot(tasks, executors, tenant_weights=dict(recorded.tenant_weights))
    return PlannerInputs(snapshot, planner_config_to_domain(recorded.limits))


def simulate_trace(profile: PlannerInputs, trace: dict[str, Any], num_devices: int) -> Iterator[dict[str, Any]]:
    """Yield a summary of the trace for each policy. Raises InvalidInputError."""
    executors = _replicated(profile.snapshot.executors, num_devices or len(profile.snapshot.executors))
    arriving = [_with_tenant_name(arrival) for arrival in _arrivals(trace, executors[0].backbone.name)]
    limits = profile.limits
    if not arriving:
        raise InvalidInputError.of_field("trace", "has no arrival")
    estimator = DemandEstimator(limits)
    policies: dict[str, SchedulingPolicy] = {
        "muxtune": PlannerPolicy(limits, profile.snapshot.tenant_weights),
        "one instance a task": SeparateInstances(limits),
        "batch everything": PaddedBatching(limits),
    }
    for name, policy in policies.items():
        started = time.perf_counter()
        run = simulate(arriving, executors, policy, replan_seconds=_replan_seconds(arriving, executors, limits))
        try:
            summary = summarise(run, lambda task: seconds_alone(task, executors[0], limits, estimator))
        except ValueError as error:
            raise InvalidInputError.of_field("trace", str(error)) from error
        yield {"policy": name, **dataclasses.asdict(summary), "simulated_in_seconds": time.perf_counter() - started}


def _resident(task: pb.HypotheticalTask, age: int) -> TaskView:
    spec = spec_to_domain(task.spec)
    return TaskView(
        task.task, tenant_of(task.task), spec, age, task.num_steps, task.step, task.num_train_tokens,
        tuple(task.length_quantiles), task.executor, num_heldout_rows=task.num_heldout_rows,
    )  # fmt: skip


def _replicated(executors: tuple[ExecutorView, ...], count: int) -> list[ExecutorView]:
    """Return `count` executors: copies, in turn, of those that host the first one's backbone."""
    if not 1 <= count <= MAX_DEVICES:
        raise InvalidInputError.of_field("num_devices", f"{count} is not in 1 to {MAX_DEVICES}")
    kinds = [e for e in executors if e.backbone.name == executors[0].backbone.name]
    if not all(kind.can_predict for kind in kinds):
        raise InvalidInputError.of_field("profile.executors", "one has no measured costs yet; record the profile later")
    return [
        dataclasses.replace(kinds[i % len(kinds)], name=executor_name(str(i)), is_draining=False) for i in range(count)
    ]


def _arrivals(trace: dict[str, Any], backbone: str) -> list[Arrival]:
    if "lines" in trace:
        return read(trace["lines"], backbone, _TRACE_TARGET_MODULES)
    try:
        return arrivals(TraceParameters(**trace, backbone=backbone, target_modules=_TRACE_TARGET_MODULES))
    except (TypeError, ValueError) as error:
        raise InvalidInputError.of_field("trace", str(error)) from error


def _with_tenant_name(arrival: Arrival) -> Arrival:
    """Return the arrival with its tenant's full name, as the profile's weights have it."""
    return dataclasses.replace(arrival, task=dataclasses.replace(arrival.task, tenant=tenant_name(arrival.task.tenant)))


def _replan_seconds(arriving: list[Arrival], executors: list[ExecutorView], limits: PlannerConfig) -> float:
    """Return the time between plans: a fraction of the executors' total work or, if longer, of the time of arrivals."""
    estimator = DemandEstimator(limits)
    alone = sum(seconds_alone(arrival.task, executors[0], limits, estimator) for arrival in arriving)
    work = alone / len(executors)
    return max(work, arriving[-1].seconds - arriving[0].seconds) / _NUM_PLANS


if __name__ == "__main__":
    sys.exit(main())
