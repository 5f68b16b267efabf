"""`muxtune executor`: drain. An operator's command."""

from typing import Annotated

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, console, operator_channel
from muxtune.errors import raising
from muxtune.resource_names import executor_name
from muxtune.v1 import scheduling_pb2, scheduling_pb2_grpc

app = typer.Typer(help="Executors (for operators).", no_args_is_help=True)
_DRAIN_SECONDS = 120.0


@app.callback()
def executors() -> None:
    """So that a command is named though there is one only."""


@app.command(epilog="Example: muxtune executor drain gpu-0")
def drain(
    name: Annotated[str, typer.Argument(help="MUXTUNE_EXECUTOR_NAME of one.")],
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Have an executor checkpoint and hand back its tasks, before it is stopped: it takes no more."""
    full = executor_name(name)
    with operator_channel(data, "scheduling") as (channel, metadata), raising():
        stub = scheduling_pb2_grpc.SchedulingServiceStub(channel)
        stub.DrainExecutor(
            scheduling_pb2.DrainExecutorRequest(executor=full), timeout=_DRAIN_SECONDS, metadata=metadata
        )
    console.print(f"{full} has handed back its tasks and takes no more until it is started anew")
