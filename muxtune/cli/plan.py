"""`muxtune plan`: what runs where, beside whom, and why; what would be; the planner without a mesh. For operators."""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from muxtune.cli import offline
from muxtune.cli.context import (
    DEFAULT_DATA,
    DataOption,
    JsonOption,
    client_of,
    console,
    errors_as_lines,
    operator_channel,
    print_json,
    table,
)
from muxtune.cli.spec import read_spec
from muxtune.errors import InvalidInputError, raising
from muxtune.resource_names import task_name, tenant_name, tenant_of
from muxtune.v1 import plan_pb2, scheduling_pb2, scheduling_pb2_grpc

app = typer.Typer(help="The plan that runs, and what would be (for operators).", no_args_is_help=True)
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="What `muxtune plan profile` wrote; no mesh is asked.")
]
_SECONDS = 60.0


@app.command(epilog="Example: muxtune plan show --json")
def show(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Show the current plan and the explanation of every unfinished task."""
    with _scheduling(data) as call:
        answer = call.GetPlan(scheduling_pb2.GetPlanRequest())
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
    """Show why a task runs where it runs or waits, beside whom, and what that costs it. Other tenants' tasks are only
    counted."""
    with _scheduling(data) as call:
        answer = call.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=task))
        if json:
            return print_json([answer])
        for label, text in _told(answer):
            console.print(f"{label + ':':10} {text}")


@app.command(epilog="Examples: muxtune plan whatif new.yaml   |   muxtune plan whatif --profile profile.json new.yaml")
def whatif(
    specs: Annotated[list[Path], typer.Argument(help="Specs of tasks as YAML.")],
    profile: ProfileOption = None,
    mean_tokens: Annotated[
        float,
        typer.Option(min=0, help="Of a sequence, with --profile, where no dataset is read. 0: half its most."),
    ] = 0.0,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Show what would be planned, and when all would be done, had these tasks been created too. Nothing is changed."""
    with errors_as_lines():
        if profile is not None:
            answer = offline.whatif(profile, [_guessed(path, mean_tokens) for path in specs])
        else:
            asked = _estimated(specs, data)
            with _scheduling(data) as call:
                answer = call.SimulatePlan(scheduling_pb2.SimulatePlanRequest(tasks=asked))
        if json:
            return print_json([answer])
        _show_explanations(answer.explanations)
        rows = ((f.task, _seconds(f, "seconds_left"), _seconds(f, "seconds_left_with")) for f in answer.forecasts)
        table("", ("task", "seconds left", "with these"), rows)


@app.command(epilog="Example: muxtune plan timeline -o plan.svg")
def timeline(
    output: Annotated[Path, typer.Option("-o", "--output", help="The SVG file.")],
    executor: Annotated[str, typer.Option(help="executors/NAME; default: the first that runs something.")] = "",
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Draw an executor's hTasks over its stages, by predicted seconds."""
    with _scheduling(data) as call:
        told = call.GetPlan(scheduling_pb2.GetPlanRequest()).explanations
        there = [e.task for e in told if e.executor and executor in ("", e.executor)]
        if not there:
            raise InvalidInputError(f"nothing runs on {executor or 'any executor'}: there is nothing to draw")
        output.write_text(call.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=there[0])).timeline_svg)
    console.print(str(output))


@app.command(epilog="Example: muxtune plan profile > profile.json")
def profile(data: DataOption = DEFAULT_DATA) -> None:
    """Print what plans are made from, as JSON: executors with their costs, unfinished tasks, settings."""
    with _scheduling(data) as call:
        print_json([call.GetProfile(scheduling_pb2.GetProfileRequest()).profile])


@app.command(
    epilog="Examples: muxtune plan simulate --generate 1000 --rate 0.5 --devices 16   |   "
    "muxtune plan simulate --profile profile.json --trace arrivals.jsonl"
)
def simulate(
    trace: Annotated[Path | None, typer.Option(help="Arrivals as JSON Lines: docs/planning.md.")] = None,
    generate: Annotated[int, typer.Option(min=0, help="Tasks to make up, where there is no --trace.")] = 0,
    rate: Annotated[float, typer.Option(help="Arrivals a second, on average.")] = 1.0,
    burst: Annotated[float, typer.Option(min=1, help="Arrivals at once, on average; 1: Poisson.")] = 1.0,
    steps: Annotated[float, typer.Option(min=1, help="Steps of a task, the median.")] = 200.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    devices: Annotated[int, typer.Option(min=0, help="Executors like those recorded. 0: as many as those.")] = 0,
    profile: ProfileOption = None,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Run the planner over an arrival trace on simulated executors, beside two simpler policies."""
    with errors_as_lines():
        if (trace is None) == (generate == 0):
            raise InvalidInputError("give either --trace FILE or --generate NUMBER")
        recorded = offline.read_profile(profile) if profile else _profile(data)
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
                console.print_json(data=row, indent=None)
            else:
                console.print(offline.told(row))


@dataclasses.dataclass(frozen=True)
class _PlanRpc:
    """The service's methods, with the mesh secret and a deadline."""

    stub: scheduling_pb2_grpc.SchedulingServiceStub
    metadata: tuple[tuple[str, str], ...]

    def __getattr__(self, method: str) -> Any:
        return lambda request: getattr(self.stub, method)(request, timeout=_SECONDS, metadata=self.metadata)


@contextmanager
def _scheduling(data: Path) -> Iterator[_PlanRpc]:
    with operator_channel(data, "scheduling") as (channel, metadata), raising():
        yield _PlanRpc(scheduling_pb2_grpc.SchedulingServiceStub(channel), metadata)


def _profile(data: Path) -> dict[str, Any]:
    with _scheduling(data) as call:
        answer = call.GetProfile(scheduling_pb2.GetProfileRequest())
        fields: dict[str, Any] = MessageToDict(answer.profile, preserving_proto_field_name=True)
        return fields


def _estimated(specs: list[Path], data: Path) -> list[scheduling_pb2.HypotheticalTask]:
    """As admission reads them, datasets and all."""
    made = []
    with client_of(data) as client:
        for path in specs:
            spec = read_spec(path)
            estimate = client.estimate_task(spec)
            made.append(
                scheduling_pb2.HypotheticalTask(
                    task=_name(path, spec.dataset), spec=spec, num_steps=estimate.num_steps,
                    num_train_tokens=estimate.num_train_tokens, length_quantiles=estimate.length_quantiles,
                )
            )  # fmt: skip
    return made


def _guessed(path: Path, mean_tokens: float) -> scheduling_pb2.HypotheticalTask:
    """Without a dataset: as many steps as the spec says, of sequences of so many tokens."""
    spec = read_spec(path)
    training = spec.training
    if training.num_steps < 1:
        raise InvalidInputError(
            f"{path}: training.num_steps: must be set, as epochs can't be counted without a dataset"
        )
    return scheduling_pb2.HypotheticalTask(
        task=_name(path, spec.dataset), spec=spec, num_steps=training.num_steps, mean_tokens=mean_tokens
    )


def _name(path: Path, dataset: str) -> str:
    return task_name(tenant_of(dataset) or tenant_name("whatif"), f"whatif-{path.stem}")


def _told(answer: scheduling_pb2.ExplainPlanResponse) -> Iterator[tuple[str, str]]:
    e = answer.explanation
    yield "where", e.executor or "waits"
    yield "why", e.reason
    if not e.executor:
        return
    yield "beside", _beside(e)
    if answer.HasField("htask"):
        yield "hTask", f"{answer.htask.token_budget} tokens a microbatch, chunks of {answer.htask.chunk_tokens}"
    yield (
        "a step",
        f"predicted {_seconds(e, 'predicted_step_seconds')}, measured {_seconds(e, 'measured_step_seconds')}",
    )
    yield "a round", f"{_seconds(e, 'round_seconds')}, alone it would be {_seconds(e, 'alone_round_seconds')}"
    yield "bytes", f"adds {_bytes(e.predicted_bytes)}, an instance of its own would take {_bytes(e.alone_bytes)}"
    yield "padding", f"predicted {_share(e, 'predicted_padding_fraction')}, so far {_share(e, 'padding_fraction')}"
    late = ", after its deadline" if e.misses_deadline else ""
    yield "done in", f"{_seconds(e, 'predicted_seconds_left')}{late}"


def _beside(e: plan_pb2.TaskExplanation) -> str:
    tenant = tenant_of(e.task)
    own = [name for name in e.neighbours if tenant_of(name) == tenant]
    others = len(e.neighbours) - len(own)
    told = [*own, *([f"{others} of other tenants"] if others else [])]
    return ", ".join(told) or "nobody"


def _show_explanations(explanations: Iterable[plan_pb2.TaskExplanation]) -> None:
    rows = ((e.task, e.executor or "(waits)", len(e.neighbours), e.predicted_bytes, e.reason) for e in explanations)
    table("", ("task", "executor", "neighbours", "bytes", "why"), rows)


def _seconds(message: Any, field: str) -> str:
    if not message.HasField(field):
        return "not known"
    seconds = getattr(message, field)
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"  # never 3.65e+03


def _share(message: Any, field: str) -> str:
    return f"{getattr(message, field):.1%}" if message.HasField(field) else "not known"


def _bytes(number: int) -> str:
    unit, size = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if number >= s or u == "kB")
    return f"{number / size:.3g} {unit}"
