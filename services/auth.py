"""Who calls: a tenant by its API key, or the mesh by its own secret, in `authorization: Bearer ...`.

Health and reflection are open. What a principal may see is checked by the servicers, name by name, before anything
else (AIP-211).
"""

import hmac
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from engine.errors import UnauthenticatedError

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
_METADATA_KEY = "authorization"


@dataclass(frozen=True)
class Principal:
    """`tenant`: "tenants/{tenant}" of an API key, or None for the mesh itself."""

    tenant: str | None

    @property
    def is_mesh(self) -> bool:
        return self.tenant is None


Authenticate = Callable[[str, str], Awaitable[Principal]]  # (full method, token) -> principal

_principal: ContextVar[Principal] = ContextVar("principal")


def current_principal() -> Principal:
    """The caller of the RPC being served."""
    return _principal.get()


def set_principal(principal: Principal) -> None:
    """For the gate of the server, and for tests."""
    _principal.set(principal)


def bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The token of a call's metadata. Raises UnauthenticatedError, saying what to send, if there is none."""
    for key, value in metadata or ():
        if key == _METADATA_KEY and isinstance(value, str) and value.lower().startswith("bearer "):
            return value[len("bearer ") :].strip()
    raise UnauthenticatedError('no key: send metadata "authorization: Bearer <API key>"')


def bearer_metadata(token: str) -> tuple[str, str]:
    return _METADATA_KEY, f"Bearer {token}"


def mesh_authenticator(secret: str) -> Authenticate:
    """Takes the mesh secret only. Raises UnauthenticatedError for anything else."""

    async def authenticate(method: str, token: str) -> Principal:
        if not hmac.compare_digest(token.encode(), secret.encode()):
            raise UnauthenticatedError("the mesh secret is wrong")
        return Principal(None)

    return authenticate
