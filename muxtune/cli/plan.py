"""`muxtune plan show`: what runs where, beside whom, and why. An operator's command."""

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, console, operator_channel, print_json, table
from muxtune.errors import raising
from muxtune.v1 import scheduling_pb2, scheduling_pb2_grpc

app = typer.Typer(help="The plan that runs (for operators).", no_args_is_help=True)


@app.callback()
def plan() -> None:
    """Keeps `show` a subcommand: others join it."""


@app.command(epilog="Example: muxtune plan show --json")
def show(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Show the current plan and the explanation of every unfinished task."""
    with operator_channel(data, "scheduling") as (channel, metadata), raising():
        stub = scheduling_pb2_grpc.SchedulingServiceStub(channel)
        answer = stub.GetPlan(scheduling_pb2.GetPlanRequest(), timeout=30, metadata=metadata)
        if json:
            return print_json([answer])
        for executor in answer.executors:
            console.print(f"{executor.executor}, plan {executor.version}")
            for index, htask in enumerate(executor.htasks):
                console.print(
                    f"  hTask {index}: {len(htask.tasks)} tasks, {htask.token_budget} tokens a microbatch, "
                    f"chunks of {htask.chunk_tokens}"
                )
        rows = ((e.task, e.executor or "(waits)", len(e.neighbours), e.predicted_bytes, e.reason)
                for e in answer.explanations)  # fmt: skip
        table("", ("task", "executor", "neighbours", "bytes", "why"), rows)
