"""Queries about the plan: why a task runs where it runs, and how more tasks would change the plan."""

import dataclasses
from collections.abc import Mapping, Sequence

from engine.errors import InvalidInputError, NotFoundError
from engine.planning.planner import plan as make_plan
from engine.planning.simulation.whatif import forecast, picture
from engine.planning.types import Plan, PlannerConfig, Snapshot, TaskView
from engine.task import Training
from muxtune.v1 import plan_pb2
from muxtune.v1 import scheduling_pb2 as pb
from services.conversion.plan import cost_to_proto, explanation_to_proto, htask_to_proto, planner_config_to_proto
from services.conversion.plan_parts import split_plan
from services.conversion.spec_limits import check_spec_limits
from services.conversion.task import spec_to_domain, spec_to_proto
from services.message_parts import cut, joined
from services.resource_names import tenant_of
from services.scheduling.ledger_reader import LedgerSnapshot

MAX_HYPOTHETICAL_TASKS = 256


def planner_profile(
    snapshot: LedgerSnapshot, limits: PlannerConfig, weights: Mapping[str, float]
) -> list[pb.GetProfileResponse]:
    """Return the planner's inputs, in pages, as a recording for `services.scheduling.offline_planner`. Of specs they
    have what planning needs."""
    specs = {name: spec_to_proto(planning.spec) for name, planning in snapshot.specs.items()}
    tasks = (
        pb.HypotheticalTask(
            task=entry.task.name,
            spec=specs[entry.task.name],
            num_steps=snapshot.specs[entry.task.name].num_steps,
            num_train_tokens=snapshot.specs[entry.task.name].num_train_tokens,
            length_quantiles=snapshot.specs[entry.task.name].length_quantiles,
            step=entry.task.progress.step,
            executor=entry.executor,
            num_heldout_rows=snapshot.specs[entry.task.name].num_heldout_rows,
        )
        for entry in snapshot.tasks
        if entry.task.name in specs
    )
    settings = pb.PlannerProfile(limits=planner_config_to_proto(limits), tenant_weights=weights)
    profiles = [settings, *(pb.PlannerProfile(executors=part) for part in cut(snapshot.executors))]
    profiles += [pb.PlannerProfile(tasks=part) for part in cut(tasks)]
    return [pb.GetProfileResponse(profile=profile) for profile in joined(profiles)]


def current_plan(plans: Sequence[plan_pb2.ExecutorPlan], plan: Plan) -> list[pb.GetPlanResponse]:
    """Return the executors' plans as they were sent, and the explanations of the newest plan, in pages."""
    version = max((sent.version for sent in plans), default=0)
    parts = (part for sent in plans for part in split_plan(sent))
    pages = [pb.GetPlanResponse(version=version)]
    pages += [pb.GetPlanResponse(executors=executors) for executors in cut(parts)]
    pages += [pb.GetPlanResponse(explanations=part) for part in cut(map(explanation_to_proto, plan.explanations))]
    return joined(pages)


def explain(snapshot: Snapshot, plan: Plan, limits: PlannerConfig, task: str) -> pb.ExplainPlanResponse:
    """Return why the task runs where it runs. Raises NotFoundError if the plan has no such task."""
    explanation = next((entry for entry in plan.explanations if entry.task == task), None)
    if explanation is None:
        raise NotFoundError(f"{task} is not an unfinished task of the newest plan.")
    response = pb.ExplainPlanResponse(explanation=explanation_to_proto(explanation))
    if explanation.executor:
        htasks = plan.htasks[explanation.executor]
        executor = next(e for e in snapshot.executors if e.name == explanation.executor)
        response.htask.CopyFrom(next(htask_to_proto(htask) for htask in htasks if task in htask.tasks))
        response.timeline_svg = picture(snapshot, htasks, explanation.executor, limits)
        if executor.cost.is_known:
            response.cost.CopyFrom(cost_to_proto(executor.cost))
    return response


def hypothetical_tasks(request: pb.SimulatePlanRequest, snapshot: Snapshot) -> list[TaskView]:
    """Return the request's tasks as if created after all present ones. Raises InvalidInputError."""
    names = {task.name for task in snapshot.tasks}
    age = max((task.age for task in snapshot.tasks), default=0)
    if len(request.tasks) > MAX_HYPOTHETICAL_TASKS:
        raise InvalidInputError.of_field("tasks", f"{len(request.tasks)} tasks are more than {MAX_HYPOTHETICAL_TASKS}")
    tasks = []
    for index, task in enumerate(request.tasks):
        path = f"tasks[{index}]"
        check_spec_limits(task.spec, f"{path}.spec")
        spec = spec_to_domain(task.spec, f"{path}.spec")
        for error in spec.method.validate():
            field = f"{path}.spec.{spec.method.name}.{error.field}"
            raise InvalidInputError.of_field(field, f"{error.value}: {error.remedy}")
        steps = task.num_steps or spec.training.num_steps or 0
        tenant = tenant_of(task.task)
        if not tenant or task.task in names:
            raise InvalidInputError.of_field(f"{path}.task", f'"{task.task}" must name a task that does not exist')
        tokens = task.num_train_tokens or _guessed_tokens(task, spec.training, steps)
        if steps < 1 or tokens < 1:
            raise InvalidInputError.of_field(
                f"{path}.num_steps", "steps and tokens must be positive; read them from a preflight"
            )
        if task.num_heldout_rows < 0:
            raise InvalidInputError.of_field(
                f"{path}.num_heldout_rows", f"{task.num_heldout_rows} must not be negative; read it from a preflight"
            )
        age += 1
        names.add(task.task)
        tasks.append(
            TaskView(task.task, tenant, spec, age, steps, num_train_tokens=tokens,
                     length_quantiles=tuple(task.length_quantiles), num_heldout_rows=task.num_heldout_rows)
        )  # fmt: skip
    return tasks


def _guessed_tokens(task: pb.HypotheticalTask, training: Training, num_steps: int) -> int:
    """Return the tokens of all steps by the mean length of a row; 0 where the request gives no mean."""
    if not task.HasField("mean_tokens"):
        return 0
    mean_tokens = task.mean_tokens or training.max_sequence_tokens / 2
    return round(num_steps * training.global_batch_size * mean_tokens)


def what_if(snapshot: Snapshot, limits: PlannerConfig, extra: list[TaskView]) -> list[pb.SimulatePlanResponse]:
    """Return the plan with the extra tasks, and forecasts without and with them, in pages."""
    larger = dataclasses.replace(snapshot, tasks=(*snapshot.tasks, *extra))
    before, after = forecast(snapshot, limits), forecast(larger, limits)
    explanations = map(explanation_to_proto, make_plan(larger, limits).explanations)
    forecasts = (
        pb.TaskForecast(task=task.name, seconds_left=before.get(task.name), seconds_left_with=after.get(task.name))
        for task in larger.tasks
        if task.name in before or task.name in after
    )
    pages = [pb.SimulatePlanResponse(explanations=part) for part in cut(explanations)]
    pages += [pb.SimulatePlanResponse(forecasts=part) for part in cut(forecasts)]
    return joined(pages) or [pb.SimulatePlanResponse()]
