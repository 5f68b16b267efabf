"""`muxtune key`: create, ls, revoke. Operators' commands."""

import time
from enum import StrEnum
from typing import Annotated

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, console, operator_channel, print_json, table
from muxtune.errors import raising
from muxtune.resource_names import tenant_name
from muxtune.v1 import key_pb2, key_pb2_grpc

app = typer.Typer(help="Tenants' API keys (for operators).", no_args_is_help=True)


class KeyRole(StrEnum):
    """What a key may do."""

    TENANT = "tenant"
    VIEWER = "viewer"
    OPERATOR = "operator"


@app.command(epilog="Example: muxtune key create acme --role viewer --days 30")
def create(
    tenant: Annotated[str, typer.Argument(help="A tenant's id; it is made with its first key.")] = "",
    role: Annotated[KeyRole, typer.Option(help="viewer: reads only; operator: of no tenant.")] = KeyRole.TENANT,
    days: Annotated[float, typer.Option(min=0, help="How long it holds; 0: until revoked.")] = 0,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Make a key. Its secret is shown once; the store keeps a hash."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = key_pb2.CreateApiKeyRequest(
            tenant=tenant_name(tenant), role=key_pb2.KeyRole.Value(f"KEY_ROLE_{role.upper()}")
        )
        if days:
            request.expire_time.FromNanoseconds(time.time_ns() + int(days * 86_400e9))
        answer = key_pb2_grpc.KeyServiceStub(channel).CreateApiKey(request, timeout=30, metadata=metadata)
        if json:
            return print_json([answer])
        console.print(f"{answer.key.tenant or role}, key {answer.key.id}; keep this, it is not shown again:")
        console.print(answer.secret)


@app.command(epilog="Example: muxtune key ls --tenant acme")
def ls(
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """List keys: never their secrets."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = key_pb2.ListApiKeysRequest(tenant=tenant_name(tenant))
        answer = key_pb2_grpc.KeyServiceStub(channel).ListApiKeys(request, timeout=30, metadata=metadata)
        if json:
            return print_json(answer.keys)
        rows = (
            (
                key.id,
                key.tenant or "-",
                key_pb2.KeyRole.Name(key.role).removeprefix("KEY_ROLE_").lower(),
                key.create_time.ToDatetime(),
                key.expire_time.ToDatetime() if key.HasField("expire_time") else "-",
                key.revoke_time.ToDatetime() if key.HasField("revoke_time") else "-",
            )
            for key in answer.keys
        )
        table("", ("id", "tenant", "role", "created", "expires", "revoked"), rows)


@app.command(epilog="Example: muxtune key revoke 6ce7bab7a897")
def revoke(id: str, data: DataOption = DEFAULT_DATA) -> None:
    """Revoke a key at once, for good."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = key_pb2.RevokeApiKeyRequest(id=id)
        answer = key_pb2_grpc.KeyServiceStub(channel).RevokeApiKey(request, timeout=30, metadata=metadata)
        console.print(f"key {answer.key.id} of {answer.key.tenant} is revoked")
