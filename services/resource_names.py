"""Resource names (Google AIP-122), and who may say them."""

import re
import secrets

from engine.errors import InvalidInputError, PermissionDeniedError
from services.rpc.authentication import Principal

_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def authorize(principal: Principal, name: str, collection: str) -> str:
    """`name` if it is of `collection` ("tasks") and the caller's own; raises PermissionDeniedError otherwise.

    Another tenant's name, one that does not exist and one that is no name all answer alike (AIP-211).
    """
    prefix = f"{principal.tenant}/{collection}/"
    if principal.tenant is None or not name.startswith(prefix) or not _ID.fullmatch(name.removeprefix(prefix)):
        raise denied(name)
    return name


def denied(name: str) -> PermissionDeniedError:
    return PermissionDeniedError(f'"{name}" does not exist, or this key may not see it', subject=name)


def parent_of(principal: Principal, parent: str) -> str:
    """The tenant to act for: `parent`, or the key's own if empty."""
    if principal.tenant is None or (parent and parent != principal.tenant):
        raise denied(parent)
    return principal.tenant


def new_name(tenant: str, collection: str, asked: str, field: str) -> str:
    """The name asked for, or a fresh one. Raises InvalidInputError for an id that is none."""
    if asked and not _ID.fullmatch(asked):
        raise InvalidInputError.of_field(
            field, f'"{asked}" is no id: lower-case letters, digits and hyphens, a letter first, at most 63'
        )
    return f"{tenant}/{collection}/{asked or collection[0] + '-' + secrets.token_hex(6)}"


def check_tenant(tenant: str) -> str:
    """Raises InvalidInputError unless `tenant` is "tenants/{id}"."""
    if not tenant.startswith("tenants/") or not _ID.fullmatch(tenant.removeprefix("tenants/")):
        raise InvalidInputError.of_field("tenant", f'"{tenant}" is no tenant: write "tenants/{{id}}"')
    return tenant
