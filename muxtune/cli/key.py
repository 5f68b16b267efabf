"""`muxtune key`: create, ls, revoke. Operators' commands."""

from typing import Annotated

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, console, operator_channel, print_json, table
from muxtune.errors import raising
from muxtune.v1 import key_pb2, key_pb2_grpc

app = typer.Typer(help="Tenants' API keys (for operators).", no_args_is_help=True)


@app.command(epilog="Example: muxtune key create acme")
def create(
    tenant: Annotated[str, typer.Argument(help="A tenant's id; it is made with its first key.")],
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Make a key. Its secret is shown once; the store keeps a hash."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = key_pb2.CreateApiKeyRequest(tenant=_name(tenant))
        answer = key_pb2_grpc.KeyServiceStub(channel).CreateApiKey(request, timeout=30, metadata=metadata)
        if json:
            return print_json([answer])
        console.print(f"{answer.key.tenant}, key {answer.key.id}; keep this, it is not shown again:")
        console.print(answer.secret)


@app.command(epilog="Example: muxtune key ls --tenant acme")
def ls(
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """List keys: never their secrets."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = key_pb2.ListApiKeysRequest(tenant=_name(tenant) if tenant else "")
        answer = key_pb2_grpc.KeyServiceStub(channel).ListApiKeys(request, timeout=30, metadata=metadata)
        if json:
            return print_json(answer.keys)
        rows = (
            (
                key.id,
                key.tenant,
                key.create_time.ToDatetime(),
                key.revoke_time.ToDatetime() if key.HasField("revoke_time") else "-",
            )
            for key in answer.keys
        )
        table("", ("id", "tenant", "created", "revoked"), rows)


@app.command(epilog="Example: muxtune key revoke 6ce7bab7a897")
def revoke(id: str, data: DataOption = DEFAULT_DATA) -> None:
    """Revoke a key at once, for good."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = key_pb2.RevokeApiKeyRequest(id=id)
        answer = key_pb2_grpc.KeyServiceStub(channel).RevokeApiKey(request, timeout=30, metadata=metadata)
        console.print(f"key {answer.key.id} of {answer.key.tenant} is revoked")


def _name(tenant: str) -> str:
    return tenant if tenant.startswith("tenants/") else f"tenants/{tenant}"
