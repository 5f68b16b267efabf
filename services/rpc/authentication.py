"""Authentication: services and the operator by certificate, tenants by a token in `authorization: Bearer ...`.

services/rpc/authorization.py decides what a caller may call. The servicers check which names a tenant may see, before
anything else (AIP-211).
"""

import hmac
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Any

from engine.errors import PermissionDeniedError, UnauthenticatedError
from services.resource_names import executor_of_host
from services.rpc.authorization import Principal, Role

_METADATA_KEY = "authorization"

Authenticate = Callable[[str, str], Awaitable[Principal]]  # (full method, token) -> principal

_principal: ContextVar[Principal] = ContextVar("principal")


def current_principal() -> Principal:
    """Return the caller of the RPC being served."""
    return _principal.get()


def set_principal(principal: Principal) -> None:
    """Set the caller of the RPC being served; called by the interceptor and by tests."""
    _principal.set(principal)


def certificate_principal(context: Any) -> Principal | None:
    """Return the principal of the client certificate that the TLS handshake verified; None for a call without one.

    Its metadata is ignored. Raises PermissionDeniedError if the common name is not a role, or if an executor's
    certificate does not name the executor.
    """
    properties = context.auth_context()
    names = properties.get("x509_common_name")
    if not names:
        return None
    name = names[0].decode(errors="replace")
    if name not in _CERTIFICATE_ROLES:
        raise PermissionDeniedError(
            f'The certificate\'s common name "{name}" is not a service of this mesh. Make one with `muxtune certs`.'
        )
    if name != Role.EXECUTION:
        return Principal(None, Role(name), f"certificate {name}")
    executor = _executor_of(properties.get("peer_dns", ()))
    return Principal(None, Role.EXECUTION, f"certificate of {executor}", executor)


def _executor_of(dns_names: Iterable[bytes]) -> str:
    hosts = [name.decode(errors="replace") for name in dns_names]
    executors = [executor for host in hosts if (executor := executor_of_host(host)) is not None]
    if len(executors) != 1:
        raise PermissionDeniedError(
            "The certificate must name exactly one executor. Make one with `muxtune certs FOLDER --executor NAME`."
        )
    return executors[0]


def check_executor(principal: Principal, executor: str) -> None:
    """Raise PermissionDeniedError if the caller's certificate names another executor."""
    if principal.role is Role.EXECUTION and principal.executor != executor:
        raise PermissionDeniedError(
            f'The certificate is for {principal.executor}, not for "{executor}". Make one for each executor with '
            f"`muxtune certs FOLDER --executor NAME`.",
            subject=executor,
        )


_CERTIFICATE_ROLES = {Role.OPERATOR, Role.ADMISSION, Role.SCHEDULING, Role.ALIGNMENT, Role.EXECUTION}


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the token in a call's metadata. Raises UnauthenticatedError if there is none."""
    for key, value in metadata or ():
        if key == _METADATA_KEY and isinstance(value, str) and value.lower().startswith("bearer "):
            return value[len("bearer ") :].strip()
    raise UnauthenticatedError('The call has no API key. Send the metadata "authorization: Bearer <API key>".')


def bearer_metadata(token: str) -> tuple[str, str]:
    return _METADATA_KEY, f"Bearer {token}"


def mesh_authenticator(secret: str) -> Authenticate:
    """Return a function that accepts only the mesh secret, and nothing if the secret is empty (mesh with certificates).

    It raises UnauthenticatedError for any other token.
    """

    async def authenticate(method: str, token: str) -> Principal:
        if not secret or not hmac.compare_digest(token.encode(), secret.encode()):
            raise UnauthenticatedError("The mesh secret is wrong. Set the same MUXTUNE_MESH_SECRET for all services.")
        return Principal(None)

    return authenticate
