"""`muxtune adapter`: pull, push."""

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, client_of, console, print_json

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
