"""`muxtune adapter`: uploads, lists, downloads and deletes adapters."""

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, IdOption, JsonOption, open_client
from muxtune.cli.terminal import console, print_json, table

app = typer.Typer(help="Upload, list, download and delete adapters, as PEFT folders.", no_args_is_help=True)


@app.command(epilog="Example: muxtune adapter download tenants/default/tasks/replies ./replies-adapter")
@app.command("pull", hidden=True)
def download(
    name: Annotated[str, typer.Argument(help="Name of a task or an adapter.")],
    dest: Annotated[Path, typer.Argument(help="Folder to create; an existing adapter in it is replaced.")],
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Download and check an adapter, completely or not at all. Load it with peft.PeftModel.from_pretrained."""
    with open_client(data) as client:
        folder = client.download_adapter(name, dest)
        files = ", ".join(sorted(path.name for path in folder.iterdir()))
        console.print(f"{folder}: {files}")


@app.command(epilog="Example: muxtune adapter upload ./replies-adapter --id replies-before")
@app.command("push", hidden=True)
def upload(
    folder: Annotated[Path, typer.Argument(help="PEFT folder.")],
    id: IdOption = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Upload an adapter, for tasks to continue from (their initial_adapter)."""
    with open_client(data) as client:
        adapter = client.upload_adapter(folder, id)
        if json:
            return print_json([adapter])
        console.print(f"{adapter.name}: {adapter.size_bytes} bytes")


@app.command("list", epilog="Example: muxtune adapter list --json")
@app.command("ls", hidden=True)
def list_(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """List uploaded and trained adapters, newest first."""
    with open_client(data) as client:
        adapters = list(client.list_adapters())
        if json:
            return print_json(adapters)
        rows = ((a.name, a.size_bytes, f"{a.create_time.ToDatetime():%Y-%m-%d %H:%M} UTC") for a in adapters)
        table("", ("name", "bytes", "created"), rows)


@app.command(epilog="Example: muxtune adapter delete tenants/default/adapters/replies-before")
@app.command("rm", hidden=True)
def delete(
    name: Annotated[str, typer.Argument(help="tenants/TENANT/adapters/ID; a trained adapter has the ID of its task.")],
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Delete an adapter that no unfinished task starts from."""
    with open_client(data) as client:
        client.delete_adapter(name)
        console.print(f"{name} is deleted")
