"""Who calls: a service or the operator by its certificate, a tenant by a token in `authorization: Bearer ...`.

What a caller may call stands in services/rpc/authorization.py. What a tenant may see is checked by the servicers, name
by name, before anything else (AIP-211).
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
    """The caller of the RPC being served."""
    return _principal.get()


def set_principal(principal: Principal) -> None:
    """For the interceptor, and for tests."""
    _principal.set(principal)


def certificate_principal(context: Any) -> Principal | None:
    """The peer of a call whose certificate the handshake has verified; None where it showed none.

    Nothing that such a peer says of itself in metadata counts. Raises PermissionDeniedError for a name that is no role,
    and for an executor's that does not say which.
    """
    shown = context.auth_context()
    names = shown.get("x509_common_name")
    if not names:
        return None
    name = names[0].decode(errors="replace")
    if name not in _CERTIFIED:
        raise PermissionDeniedError(f'the certificate of "{name}" is of no service of this mesh')
    if name != Role.EXECUTION:
        return Principal(None, Role(name), f"certificate {name}")
    executor = _executor_of(shown.get("peer_dns", ()))
    return Principal(None, Role.EXECUTION, f"certificate of {executor}", executor)


def _executor_of(dns_names: Iterable[bytes]) -> str:
    hosts = [name.decode(errors="replace") for name in dns_names]
    executors = [executor for host in hosts if (executor := executor_of_host(host)) is not None]
    if len(executors) != 1:
        raise PermissionDeniedError(
            "the certificate does not say which executor it is of: make one by `muxtune certs FOLDER --executor NAME`"
        )
    return executors[0]


def check_executor(principal: Principal, executor: str) -> None:
    """Raises PermissionDeniedError where the caller's certificate names another executor."""
    if principal.role is Role.EXECUTION and principal.executor != executor:
        raise PermissionDeniedError(
            f'the certificate is of {principal.executor}, not of "{executor}": give each executor its own, '
            f"`muxtune certs FOLDER --executor NAME` makes it",
            subject=executor,
        )


_CERTIFIED = {Role.OPERATOR, Role.ADMISSION, Role.SCHEDULING, Role.ALIGNMENT, Role.EXECUTION}


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The token of a call's metadata. Raises UnauthenticatedError, saying what to send, if there is none."""
    for key, value in metadata or ():
        if key == _METADATA_KEY and isinstance(value, str) and value.lower().startswith("bearer "):
            return value[len("bearer ") :].strip()
    raise UnauthenticatedError('no key: send metadata "authorization: Bearer <API key>"')


def bearer_metadata(token: str) -> tuple[str, str]:
    return _METADATA_KEY, f"Bearer {token}"


def mesh_authenticator(secret: str) -> Authenticate:
    """Takes the mesh secret only; with none (services have certificates then), nothing.

    Raises UnauthenticatedError for anything else.
    """

    async def authenticate(method: str, token: str) -> Principal:
        if not secret or not hmac.compare_digest(token.encode(), secret.encode()):
            raise UnauthenticatedError("the mesh secret is wrong")
        return Principal(None)

    return authenticate
