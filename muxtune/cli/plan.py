"""`muxtune plan`: shows and explains the plan, answers what-if questions and simulates traces, for operators."""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from muxtune.cli import offline
from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, open_client, operator_channel, print_errors
from muxtune.cli.spec import read_spec
from muxtune.cli.terminal import console, format_json, print_json, table
from muxtune.errors import InvalidInputError, raising
from muxtune.resource_names import task_name, tenant_name, tenant_of
from muxtune.v1 import plan_pb2, scheduling_pb2, scheduling_pb2_grpc

app = typer.Typer(help="Show, explain and simulate plans (for operators).", no_args_is_help=True)
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="File written by `muxtune plan profile`, to use in place of a mesh.")
]
_SECONDS = 60.0


@app.command(epilog="Example: muxtune plan get --json")
@app.command("show", hidden=True)
def get(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Show the current plan and the explanation of each unfinished task."""
    with _scheduling(data) as call:
        answer = call.all_pages("GetPlan", scheduling_pb2.GetPlanRequest())
        if json:
            return print_json([answer])
        for executor in answer.executors:
            console.print(f"{executor.executor}, plan {executor.version}")
            for index, htask in enumerate(executor.htasks):
                console.print(
                    f"  hTask {index}: {len(htask.tasks)} tasks, {htask.token_budget} tokens a microbatch, "
                    f"chunks of {htask.chunk_tokens}"
                )
        _show_explanations(answer.explanations)


@app.command(epilog="Example: muxtune plan explain tenants/default/tasks/replies")
def explain(
    task: Annotated[str, typer.Argument(help="tenants/TENANT/tasks/ID")],
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Show why a task waits or runs where it runs, its neighbours, and what they cost it.

    Tasks of other tenants are counted, but not named.
    """
    with _scheduling(data) as call:
        answer = call.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=task))
        if json:
            return print_json([answer])
        for label, text in _explanation_rows(answer):
            console.print(f"{label + ':':10} {text}")


@app.command(epilog="Examples: muxtune plan whatif new.yaml   |   muxtune plan whatif --profile profile.json new.yaml")
def whatif(
    specs: Annotated[list[Path], typer.Argument(help="YAML files with specs of tasks.")],
    profile: ProfileOption = None,
    mean_tokens: Annotated[
        float,
        typer.Option(min=0, help="Mean tokens of a sequence, with --profile; 0: half the maximum."),
    ] = 0.0,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Show the plan, and when each task would end, if these tasks were created too. Nothing is changed."""
    with print_errors():
        if profile is not None:
            answer = offline.whatif(profile, [_guess_task(path, mean_tokens) for path in specs])
        else:
            tasks = _estimate_tasks(specs, data)
            with _scheduling(data) as call:
                answer = call.all_pages("SimulatePlan", scheduling_pb2.SimulatePlanRequest(tasks=tasks))
        if json:
            return print_json([answer])
        _show_explanations(answer.explanations)
        rows = ((f.task, _seconds(f, "seconds_left"), _seconds(f, "seconds_left_with")) for f in answer.forecasts)
        table("", ("task", "seconds left", "with these"), rows)


@app.command(epilog="Example: muxtune plan timeline -o plan.svg")
def timeline(
    output: Annotated[Path, typer.Option("-o", "--output", help="SVG file to write.")],
    executor: Annotated[str, typer.Option(help="executors/NAME; default: the first that runs a task.")] = "",
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Draw an executor's hTasks over its pipeline stages, by predicted seconds."""
    with _scheduling(data) as call:
        explanations = call.all_pages("GetPlan", scheduling_pb2.GetPlanRequest()).explanations
        running = [e.task for e in explanations if e.executor and executor in ("", e.executor)]
        if not running:
            raise InvalidInputError(f"No task runs on {executor or 'any executor'}: there is nothing to draw")
        output.write_text(call.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=running[0])).timeline_svg)
    console.print(str(output))


@app.command(epilog="Example: muxtune plan profile > profile.json")
def profile(data: DataOption = DEFAULT_DATA) -> None:
    """Print the planner's input as JSON: executors with their costs, unfinished tasks, settings."""
    with _scheduling(data) as call:
        print_json([call.all_pages("GetProfile", scheduling_pb2.GetProfileRequest()).profile])


@app.command(
    epilog="Examples: muxtune plan simulate --generate 1000 --rate 0.5 --devices 16   |   "
    "muxtune plan simulate --profile profile.json --trace arrivals.jsonl"
)
def simulate(
    trace: Annotated[
        Path | None, typer.Option(help="JSON Lines file of arrivals; docs/planning.md has the format.")
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Number of tasks to generate, without --trace.")] = 0,
    rate: Annotated[float, typer.Option(help="Mean arrivals per second.")] = 1.0,
    burst: Annotated[float, typer.Option(min=1, help="Mean number of tasks per arrival; 1: Poisson.")] = 1.0,
    steps: Annotated[float, typer.Option(min=1, help="Median number of steps of a task.")] = 200.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated trace.")] = 0,
    devices: Annotated[
        int, typer.Option(min=0, help="Number of executors, like those of the profile; 0: as many as it has.")
    ] = 0,
    profile: ProfileOption = None,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Run the planner and two simpler policies over an arrival trace, on simulated executors."""
    with print_errors():
        if (trace is None) == (generate == 0):
            raise InvalidInputError("Pass either --trace FILE or --generate NUMBER")
        recorded = offline.read_profile(profile) if profile else _fetch_profile(data)
        fields: dict[str, Any] = {
            "num_tasks": generate,
            "rate": rate,
            "burst": burst,
            "median_steps": steps,
            "seed": seed,
        }
        if trace is not None:
            fields = {"lines": offline.read_text(trace).splitlines()}
        for row in offline.simulate(recorded, fields, devices):
            if json:
                print(format_json(row))
            else:
                console.print(offline.format_summary(row))


@dataclasses.dataclass(frozen=True)
class _PlanRpc:
    """SchedulingService's RPCs, called with the operator's metadata and a deadline."""

    stub: scheduling_pb2_grpc.SchedulingServiceStub
    metadata: tuple[tuple[str, str], ...]

    def __getattr__(self, method: str) -> Any:
        return lambda request: getattr(self.stub, method)(request, timeout=_SECONDS, metadata=self.metadata)

    def all_pages(self, method: str, request: Any) -> Any:
        """Return the answer of all pages."""
        answer = getattr(self, method)(request)
        while answer.next_page_token:
            request = type(request)(page_token=answer.next_page_token)
            answer.next_page_token = ""
            answer.MergeFrom(getattr(self, method)(request))
        return answer


@contextmanager
def _scheduling(data: Path) -> Iterator[_PlanRpc]:
    with operator_channel(data, "scheduling") as (channel, metadata), raising():
        yield _PlanRpc(scheduling_pb2_grpc.SchedulingServiceStub(channel), metadata)


def _fetch_profile(data: Path) -> dict[str, Any]:
    with _scheduling(data) as call:
        answer = call.all_pages("GetProfile", scheduling_pb2.GetProfileRequest())
        fields: dict[str, Any] = MessageToDict(answer.profile, preserving_proto_field_name=True)
        return fields


def _estimate_tasks(specs: list[Path], data: Path) -> list[scheduling_pb2.HypotheticalTask]:
    """Return the tasks of the specs with admission's estimates, which read the datasets."""
    tasks = []
    with open_client(data) as client:
        for path in specs:
            spec = read_spec(path)
            estimate = client.estimate_task(spec)
            tasks.append(
                scheduling_pb2.HypotheticalTask(
                    task=_task_name(path, spec.dataset), spec=spec, num_steps=estimate.num_steps,
                    num_train_tokens=estimate.num_train_tokens, length_quantiles=estimate.length_quantiles,
                    num_heldout_rows=estimate.num_heldout_rows,
                )
            )  # fmt: skip
    return tasks


def _guess_task(path: Path, mean_tokens: float) -> scheduling_pb2.HypotheticalTask:
    """Return the task of a spec without reading its dataset: its sequences have `mean_tokens` tokens."""
    spec = read_spec(path)
    training = spec.training
    if training.num_steps < 1:
        raise InvalidInputError(
            f"{path}: training.num_steps is not set: set it, as epochs cannot be counted without a dataset"
        )
    return scheduling_pb2.HypotheticalTask(
        task=_task_name(path, spec.dataset), spec=spec, num_steps=training.num_steps, mean_tokens=mean_tokens
    )


def _task_name(path: Path, dataset: str) -> str:
    return task_name(tenant_of(dataset) or tenant_name("whatif"), f"whatif-{path.stem}")


def _explanation_rows(answer: scheduling_pb2.ExplainPlanResponse) -> Iterator[tuple[str, str]]:
    e = answer.explanation
    yield "where", e.executor or "waits"
    yield "why", e.reason
    if not e.executor:
        return
    yield "beside", _format_neighbours(answer)
    if answer.HasField("htask"):
        yield "hTask", f"{answer.htask.token_budget} tokens a microbatch, chunks of {answer.htask.chunk_tokens}"
    yield (
        "a step",
        f"predicted {_seconds(e, 'predicted_step_seconds')}, measured {_seconds(e, 'measured_step_seconds')}",
    )
    share, seconds = _percent(e, "device_share"), _seconds(e, "seconds_per_step")
    yield "share", f"{share} of its executor's time, a step each {seconds}"
    yield "a round", f"{_seconds(e, 'round_seconds')}, alone it would be {_seconds(e, 'alone_round_seconds')}"
    yield "bytes", f"adds {_bytes(e.predicted_bytes)}, a separate instance would take {_bytes(e.alone_bytes)}"
    yield "padding", f"predicted {_percent(e, 'predicted_padding_fraction')}, so far {_percent(e, 'padding_fraction')}"
    late = ", after its deadline" if e.misses_deadline else ""
    yield "done in", f"{_seconds(e, 'predicted_seconds_left')}{late}"


def _format_neighbours(answer: scheduling_pb2.ExplainPlanResponse) -> str:
    task, tenant = answer.explanation.task, tenant_of(answer.explanation.task)
    neighbours = [name for name in answer.htask.tasks if name != task]
    of_tenant = [name for name in neighbours if tenant_of(name) == tenant]
    num_others = len(neighbours) - len(of_tenant)
    return ", ".join([*of_tenant, *([f"{num_others} of other tenants"] if num_others else [])]) or "no other task"


def _show_explanations(explanations: Iterable[plan_pb2.TaskExplanation]) -> None:
    rows = ((e.task, e.executor or "(waits)", e.num_neighbours, e.predicted_bytes, e.reason) for e in explanations)
    table("", ("task", "executor", "neighbours", "bytes", "why"), rows)


def _seconds(message: Any, field: str) -> str:
    if not message.HasField(field):
        return "unknown"
    seconds = getattr(message, field)
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"  # never 3.65e+03


def _percent(message: Any, field: str) -> str:
    return f"{getattr(message, field):.1%}" if message.HasField(field) else "unknown"


def _bytes(number: int) -> str:
    unit, size = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if number >= s or u == "kB")
    return f"{number / size:.3g} {unit}"
