"""`muxtune certs`: creates the private CA, and a certificate for each service, executor and the operator."""

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.context import print_errors
from muxtune.cli.terminal import console
from muxtune.local.certificate_authority import CA, DAYS, LOOPBACK, issue


def certs(
    folder: Annotated[Path, typer.Argument(help="Folder of the CA; it is created if there is none.")],
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address by which clients reach admission; may be repeated.")
    ] = None,
    executor: Annotated[
        list[str] | None, typer.Option(help="MUXTUNE_EXECUTOR_NAME of an executor; may be repeated; default: local.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="Days until the new certificates expire.")] = DAYS,
) -> None:
    """Create the CA if there is none, and a new certificate for each service; running services start to use it.

    An executor can register only under the name in its certificate. Executors that have one get a new one, too.

    Keep ca.key away from the services: with it, a process can pose as any of them.
    """
    with print_errors():
        folders = issue(folder, [*LOOPBACK, *(host or ())], days, executor or ())
    console.print(f"{folder / CA}: MUXTUNE_CA of clients")
    for path in folders:
        console.print(f"{path}: MUXTUNE_CERTS of {path.relative_to(folder)}")
