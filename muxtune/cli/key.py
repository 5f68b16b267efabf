"""`muxtune key`: creates, lists and revokes tenants' API keys, for operators."""

import time
from enum import StrEnum
from typing import Annotated

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, operator_channel
from muxtune.cli.terminal import console, print_json, table
from muxtune.errors import raising
from muxtune.resource_names import tenant_name
from muxtune.v1 import key_pb2, key_pb2_grpc

app = typer.Typer(help="Create, list and revoke API keys of tenants (for operators).", no_args_is_help=True)


class KeyRole(StrEnum):
    """Roles of API keys."""

    TENANT = "tenant"
    VIEWER = "viewer"
    OPERATOR = "operator"


@app.command(epilog="Example: muxtune key create acme --role viewer --days 30")
def create(
    tenant: Annotated[str, typer.Argument(help="ID of the tenant; a new tenant is created with its first key.")] = "",
    role: Annotated[
        KeyRole, typer.Option(help="viewer: may only read; operator: belongs to no tenant.")
    ] = KeyRole.TENANT,
    days: Annotated[float, typer.Option(min=0, help="Days until the key expires; 0: never.")] = 0,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Create an API key. Its secret is shown once; the database keeps a hash."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = key_pb2.CreateApiKeyRequest(
            tenant=tenant_name(tenant), role=key_pb2.KeyRole.Value(f"KEY_ROLE_{role.upper()}")
        )
        if days:
            request.expire_time.FromNanoseconds(time.time_ns() + int(days * 86_400e9))
        answer = key_pb2_grpc.KeyServiceStub(channel).CreateApiKey(request, timeout=30, metadata=metadata)
        if json:
            return print_json([answer])
        console.print(f"{answer.key.tenant or role}, key {answer.key.id}. Keep this secret; it is not shown again:")
        console.print(answer.secret)


@app.command("list", epilog="Example: muxtune key list --tenant acme")
@app.command("ls", hidden=True)
def list_(
    tenant: Annotated[str, typer.Option(help="List only this tenant's keys.")] = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """List API keys, without their secrets."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        stub, token = key_pb2_grpc.KeyServiceStub(channel), ""
        keys: list[key_pb2.ApiKey] = []
        while True:
            request = key_pb2.ListApiKeysRequest(tenant=tenant_name(tenant), page_size=1000, page_token=token)
            answer = stub.ListApiKeys(request, timeout=30, metadata=metadata)
            keys.extend(answer.keys)
            if not (token := answer.next_page_token):
                break
        if json:
            return print_json(keys)
        rows = (
            (
                key.id,
                key.tenant or "-",
                key_pb2.KeyRole.Name(key.role).removeprefix("KEY_ROLE_").lower(),
                key.create_time.ToDatetime(),
                key.expire_time.ToDatetime() if key.HasField("expire_time") else "-",
                key.revoke_time.ToDatetime() if key.HasField("revoke_time") else "-",
            )
            for key in keys
        )
        table("", ("id", "tenant", "role", "created", "expires", "revoked"), rows)


@app.command(epilog="Example: muxtune key revoke 6ce7bab7a897")
def revoke(id: Annotated[str, typer.Argument(help="ID of the key.")], data: DataOption = DEFAULT_DATA) -> None:
    """Revoke an API key at once and for good. The list keeps it, as revoked."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = key_pb2.RevokeApiKeyRequest(id=id)
        answer = key_pb2_grpc.KeyServiceStub(channel).RevokeApiKey(request, timeout=30, metadata=metadata)
        console.print(f"key {answer.key.id} of {answer.key.tenant} is revoked")
