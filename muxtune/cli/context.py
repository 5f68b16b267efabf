"""Where the command finds the mesh, how it prints, and how an error becomes one line and an exit status."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from muxtune.client import Client
from muxtune.errors import MuxtuneError, UnauthenticatedError
from muxtune.local.certificate_authority import CA
from muxtune.local.mesh import OPERATORS_DOOR, MeshError, read_state, secure_channel
from muxtune.local.tracing import traced
from muxtune.transport import metadata

# The terminal wraps lines, not we: a path in a log or a pipe stays whole, and "[a]" in it is no markup.
_PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}
console, error_console = Console(**_PLAIN), Console(stderr=True, **_PLAIN)
DataOption = Annotated[Path, typer.Option("--data", help="Data folder of a mesh that `muxtune up` started.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
DEFAULT_DATA = Path(os.environ.get("MUXTUNE_DATA", "muxtune-data"))


@contextmanager
def client_of(data: Path) -> Iterator[Client]:
    """With MUXTUNE_ADDRESS and MUXTUNE_API_KEY, or the data folder's own mesh. Errors end the command."""
    with errors_as_lines(), traced(data):
        state = read_state(data)
        own = state.get("addresses", {}).get("admission")
        address = os.environ.get("MUXTUNE_ADDRESS") or own
        ca = data / "certs" / CA if address == own and "MUXTUNE_CA" not in os.environ else None
        key = os.environ.get("MUXTUNE_API_KEY") or state.get("api_key")
        if not address or not key:
            raise UnauthenticatedError(
                f"no mesh: start one with `muxtune up --data {data}`, or set MUXTUNE_ADDRESS and MUXTUNE_API_KEY"
            )
        with Client(address, key, ca) as client:
            yield client


@contextmanager
def operator_channel(data: Path, service: str) -> Iterator[tuple[grpc.Channel, tuple[tuple[str, str], ...]]]:
    """A channel to a service with the operator's certificate: in MUXTUNE_CERTS, or in the data folder of `muxtune up`.

    Where there is none, to admission's public address with an operator's API key.
    """
    with errors_as_lines():
        address, certs = operator_access(data, service)
        if address and certs.is_dir():
            with secure_channel(address, certs, service) as channel:
                yield channel, ()
        elif service == "admission" and os.environ.get("MUXTUNE_ADDRESS") and os.environ.get("MUXTUNE_API_KEY"):
            with Client() as client:
                yield client.channel, metadata(os.environ["MUXTUNE_API_KEY"])
        else:
            raise UnauthenticatedError(
                f"an operator's command: needs the data folder of `muxtune up` in --data, or "
                f"MUXTUNE_{service.upper()}_ADDRESS and MUXTUNE_CERTS with the operator's certificate"
            )


def operator_access(data: Path, service: str) -> tuple[str, Path]:
    """Where a service takes operators ("" if nothing says so), and the folder with their certificate."""
    known = read_state(data).get("addresses", {})
    address = os.environ.get(f"MUXTUNE_{service.upper()}_ADDRESS") or known.get(OPERATORS_DOOR.get(service, service))
    return address or "", Path(os.environ.get("MUXTUNE_CERTS") or data / "certs" / "operator")


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """What went wrong on standard error, a line a field; exit status 1."""
    try:
        yield
    except MuxtuneError as error:
        lines = [f"{v.field}: {v.description}" for v in error.violations] or [error.message]
        for line in lines:
            error_console.print(f"error: {line}", style="red")
        raise typer.Exit(1) from error
    except MeshError as error:
        error_console.print(f"error: {error}", style="red")
        raise typer.Exit(1) from error


def print_json(messages: Iterable[Message]) -> None:
    """One JSON object a line, field names as in the protos."""
    for message in messages:
        fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        print(json.dumps(fields, ensure_ascii=False), flush=True)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table for people; numbers are text already."""
    result = Table(title=title or None, title_justify="left")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    console.print(result)
