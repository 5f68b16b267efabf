"""Finds the mesh, and turns errors into lines and an exit status."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import grpc
import typer

from muxtune.cli.terminal import error_console
from muxtune.client import Client
from muxtune.errors import MuxtuneError, UnauthenticatedError
from muxtune.local.certificate_authority import CA
from muxtune.local.errors import MeshError
from muxtune.local.mesh import OPERATOR_ENDPOINTS, secure_channel
from muxtune.local.mesh_state import read_state
from muxtune.local.tracing import traced
from muxtune.transport import metadata

DataOption = Annotated[Path, typer.Option("--data", help="Data folder of the mesh that `muxtune up` started.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
IdOption = Annotated[str, typer.Option(help="Last part of the name; default: a generated ID.")]
DEFAULT_DATA = Path(os.environ.get("MUXTUNE_DATA", "muxtune-data"))


@contextmanager
def open_client(data: Path) -> Iterator[Client]:
    """Yield a client of the mesh in MUXTUNE_ADDRESS with MUXTUNE_API_KEY, or else of the data folder's mesh.

    Errors inside end the command with a line each.
    """
    with print_errors():
        state = read_state(data)
        local_address = state.get("addresses", {}).get("admission")
        address = os.environ.get("MUXTUNE_ADDRESS") or local_address
        ca = data / "certs" / CA if address == local_address and "MUXTUNE_CA" not in os.environ else None
        key = os.environ.get("MUXTUNE_API_KEY") or state.get("api_key")
        if not address or not key:
            raise UnauthenticatedError(
                f"No mesh in {data}: start one with `muxtune up --data {data}`, "
                "or set MUXTUNE_ADDRESS and MUXTUNE_API_KEY"
            )
        with traced(data), Client(address, key, ca) as client:
            yield client


@contextmanager
def operator_channel(data: Path, service: str) -> Iterator[tuple[grpc.Channel, tuple[tuple[str, str], ...]]]:
    """Yield a channel to a service, and the metadata of its calls, for an operator.

    The certificate is the operator's, in MUXTUNE_CERTS or the data folder of `muxtune up`. Without a certificate, it is
    a channel to admission's public address with an operator's API key.
    """
    with print_errors():
        address, certs = operator_access(data, service)
        if address and certs.is_dir():
            with secure_channel(address, certs, service) as channel:
                yield channel, ()
        elif service == "admission" and os.environ.get("MUXTUNE_ADDRESS") and os.environ.get("MUXTUNE_API_KEY"):
            with Client() as client:
                yield client.channel, metadata(os.environ["MUXTUNE_API_KEY"])
        else:
            raise UnauthenticatedError(
                f"This command is for operators: pass the data folder of `muxtune up` as --data, or set "
                f"MUXTUNE_{service.upper()}_ADDRESS and MUXTUNE_CERTS (the operator's certificate)"
            )


def operator_access(data: Path, service: str) -> tuple[str, Path]:
    """Return a service's address for operators ("" if it is unknown) and the folder of the operator's certificate."""
    addresses = read_state(data).get("addresses", {})
    endpoint = OPERATOR_ENDPOINTS.get(service, service)
    address = os.environ.get(f"MUXTUNE_{service.upper()}_ADDRESS") or addresses.get(endpoint)
    return address or "", Path(os.environ.get("MUXTUNE_CERTS") or data / "certs" / "operator")


@contextmanager
def print_errors() -> Iterator[None]:
    """Print an error inside to standard error, one line per field, and exit with status 1."""
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
