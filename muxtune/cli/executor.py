"""`muxtune executor`: drains executors, for operators."""

from typing import Annotated

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, operator_channel
from muxtune.cli.terminal import console
from muxtune.errors import raising
from muxtune.resource_names import executor_name
from muxtune.v1 import scheduling_pb2, scheduling_pb2_grpc

app = typer.Typer(help="Drain executors (for operators).", no_args_is_help=True)
_DRAIN_SECONDS = 120.0


@app.callback()
def executors() -> None:
    """Makes `drain` a subcommand: typer omits the name of a single command."""


@app.command(epilog="Example: muxtune executor drain gpu-0")
def drain(
    name: Annotated[str, typer.Argument(help="MUXTUNE_EXECUTOR_NAME of the executor.")],
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Drain an executor before it is stopped: it checkpoints and releases its tasks, and accepts no new ones."""
    full_name = executor_name(name)
    with operator_channel(data, "scheduling") as (channel, metadata), raising():
        stub = scheduling_pb2_grpc.SchedulingServiceStub(channel)
        stub.DrainExecutor(
            scheduling_pb2.DrainExecutorRequest(executor=full_name), timeout=_DRAIN_SECONDS, metadata=metadata
        )
    console.print(f"{full_name} has released its tasks and accepts no new ones until it is restarted")
