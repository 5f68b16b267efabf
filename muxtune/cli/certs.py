"""`muxtune certs`: the private CA, and a new certificate for each service and the operator."""

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.authority import CA, DAYS, LOOPBACK, NAMES, issue
from muxtune.cli.context import console, errors_as_lines


def certs(
    folder: Annotated[Path, typer.Argument(help="Where the CA is, or will be.")],
    host: Annotated[list[str] | None, typer.Option(help="A name or address clients reach admission by.")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the new certificates hold.")] = DAYS,
) -> None:
    """Make the CA if there is none, and a new certificate for each service. Running services take them up.

    Keep ca.key away from the services: whoever has it can be any of them.
    """
    with errors_as_lines():
        issue(folder, [*LOOPBACK, *(host or ())], days)
    console.print(f"{folder / CA}: what clients need (MUXTUNE_CA)")
    for name in NAMES:
        console.print(f"{folder / name}: MUXTUNE_CERTS of {name}")
