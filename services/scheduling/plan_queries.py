"""Questions about the plan: why a task runs where it runs, and what would be if other tasks came too."""

import dataclasses
from collections.abc import Mapping

from engine.errors import InvalidInputError, NotFoundError
from engine.planning.planner import plan as make_plan
from engine.planning.simulation.whatif import forecast, picture
from engine.planning.types import Plan, PlannerConfig, Snapshot, TaskView
from muxtune.v1 import ledger_pb2
from muxtune.v1 import scheduling_pb2 as pb
from services.conversion.plan import cost_to_proto, explanation_to_proto, htask_to_proto, planner_config_to_proto
from services.conversion.task import spec_to_domain
from services.resource_names import tenant_of

MAX_HYPOTHETICAL_TASKS = 256


def profile(
    read: ledger_pb2.GetSnapshotResponse, limits: PlannerConfig, weights: Mapping[str, float]
) -> pb.PlannerProfile:
    """What plans are made from, for `services.scheduling.offline_planner`."""
    tasks = [
        pb.HypotheticalTask(
            task=entry.task.name,
            spec=entry.task.spec,
            num_steps=entry.task.estimate.num_steps,
            num_train_tokens=entry.task.estimate.num_train_tokens,
            length_quantiles=entry.task.estimate.length_quantiles,
            step=entry.task.progress.step,
            executor=entry.executor,
        )
        for entry in read.tasks
    ]
    return pb.PlannerProfile(
        executors=read.executors, tasks=tasks, limits=planner_config_to_proto(limits), tenant_weights=weights
    )


def explain(snapshot: Snapshot, plan: Plan, limits: PlannerConfig, task: str) -> pb.ExplainPlanResponse:
    """Raises NotFoundError if the plan has no such task."""
    told = next((explanation for explanation in plan.explanations if explanation.task == task), None)
    if told is None:
        raise NotFoundError(f"{task} is no unfinished task of the newest plan")
    response = pb.ExplainPlanResponse(explanation=explanation_to_proto(told))
    if told.executor:
        htasks = plan.htasks[told.executor]
        executor = next(e for e in snapshot.executors if e.name == told.executor)
        response.htask.CopyFrom(next(htask_to_proto(htask) for htask in htasks if task in htask.tasks))
        response.timeline_svg = picture(snapshot, htasks, told.executor, limits)
        if executor.cost.is_known:
            response.cost.CopyFrom(cost_to_proto(executor.cost))
    return response


def newcomers(request: pb.SimulatePlanRequest, snapshot: Snapshot) -> list[TaskView]:
    """The hypothetical tasks, younger than all there are. Raises InvalidInputError."""
    names = {task.name for task in snapshot.tasks}
    age = max((task.age for task in snapshot.tasks), default=0)
    if len(request.tasks) > MAX_HYPOTHETICAL_TASKS:
        raise InvalidInputError.of_field("tasks", f"{len(request.tasks)}: at most {MAX_HYPOTHETICAL_TASKS}")
    found = []
    for index, asked in enumerate(request.tasks):
        path = f"tasks[{index}]"
        spec = spec_to_domain(asked.spec, f"{path}.spec")
        for wrong in spec.method.validate():
            field = f"{path}.spec.{spec.method.name}.{wrong.field}"
            raise InvalidInputError.of_field(field, f"{wrong.value}: {wrong.remedy}")
        steps = asked.num_steps or spec.training.num_steps or 0
        tenant = tenant_of(asked.task)
        if not tenant or asked.task in names:
            raise InvalidInputError.of_field(f"{path}.task", f'"{asked.task}" must name a task that does not exist')
        if steps < 1 or asked.num_train_tokens < 1:
            raise InvalidInputError.of_field(f"{path}.num_steps", "steps and tokens must be known: see preflight")
        age += 1
        names.add(asked.task)
        found.append(
            TaskView(asked.task, tenant, spec, age, steps, num_train_tokens=asked.num_train_tokens,
                     length_quantiles=tuple(asked.length_quantiles))
        )  # fmt: skip
    return found


def what_if(snapshot: Snapshot, limits: PlannerConfig, extra: list[TaskView]) -> pb.SimulatePlanResponse:
    """The plan with the newcomers, and forecasts without and with them."""
    larger = dataclasses.replace(snapshot, tasks=(*snapshot.tasks, *extra))
    before, after = forecast(snapshot, limits), forecast(larger, limits)
    return pb.SimulatePlanResponse(
        explanations=[explanation_to_proto(told) for told in make_plan(larger, limits).explanations],
        forecasts=[
            pb.TaskForecast(task=task.name, seconds_left=before.get(task.name), seconds_left_with=after.get(task.name))
            for task in larger.tasks
            if task.name in before or task.name in after
        ],
    )
