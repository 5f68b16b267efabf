"""`muxtune certs`: the private CA, and a new certificate for each service, executor and the operator."""

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.context import console, errors_as_lines
from muxtune.local.certificate_authority import CA, DAYS, LOOPBACK, issue


def certs(
    folder: Annotated[Path, typer.Argument(help="Where the CA is, or will be.")],
    host: Annotated[list[str] | None, typer.Option(help="A name or address clients reach admission by.")] = None,
    executor: Annotated[list[str] | None, typer.Option(help="MUXTUNE_EXECUTOR_NAME of one; default: local.")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the new certificates hold.")] = DAYS,
) -> None:
    """Make the CA if there is none, and a new certificate for each service. Running services take them up.

    An executor takes part under the name in its certificate and no other. Those that have one get a new one, too.

    Keep ca.key away from the services: whoever has it can be any of them.
    """
    with errors_as_lines():
        made = issue(folder, [*LOOPBACK, *(host or ())], days, executor or ())
    console.print(f"{folder / CA}: what clients need (MUXTUNE_CA)")
    for path in made:
        console.print(f"{path}: MUXTUNE_CERTS of {path.relative_to(folder)}")
