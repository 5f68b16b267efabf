"""`muxtune adapter`: pull, push, ls, rm."""

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, client_of, console, print_json, table

app = typer.Typer(help="Adapters, as PEFT folders.", no_args_is_help=True)


@app.command(epilog="Example: muxtune adapter pull tenants/default/tasks/replies ./replies-adapter")
def pull(
    name: Annotated[str, typer.Argument(help="A task's or an adapter's name.")],
    dest: Annotated[Path, typer.Argument(help="Folder to make; an adapter there is replaced.")],
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Download an adapter: checked, whole or not at all. It loads with peft.PeftModel.from_pretrained."""
    with client_of(data) as client:
        folder = client.download_adapter(name, dest)
        files = ", ".join(sorted(path.name for path in folder.iterdir()))
        console.print(f"{folder}: {files}")


@app.command(epilog="Example: muxtune adapter push ./replies-adapter --id replies-before")
def push(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder.")],
    id: Annotated[str, typer.Option(help="Last part of its name; default: one is made.")] = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Upload an adapter to continue from (a task's initial_adapter)."""
    with client_of(data) as client:
        adapter = client.upload_adapter(folder, id)
        if json:
            return print_json([adapter])
        console.print(f"{adapter.name}: {adapter.size_bytes} bytes")


@app.command(epilog="Example: muxtune adapter ls --json")
def ls(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """List adapters, uploaded ones and those that tasks left, newest first."""
    with client_of(data) as client:
        adapters = list(client.list_adapters())
        if json:
            return print_json(adapters)
        rows = ((a.name, a.size_bytes, f"{a.create_time.ToDatetime():%Y-%m-%d %H:%M} UTC") for a in adapters)
        table("", ("name", "bytes", "made"), rows)


@app.command(epilog="Example: muxtune adapter rm tenants/default/adapters/replies-before")
def rm(
    name: Annotated[str, typer.Argument(help="tenants/TENANT/adapters/ID; of a task's adapter, ID is the task's.")],
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Delete an adapter that no unfinished task starts from."""
    with client_of(data) as client:
        client.delete_adapter(name)
        console.print(f"{name} is deleted")
