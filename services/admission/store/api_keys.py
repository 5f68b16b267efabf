"""API keys: `mxt_<id>_<secret>`. Only a hash of the secret is kept; the secret itself is shown once."""

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from engine.errors import InvalidInputError, NotFoundError, UnauthenticatedError
from services.admission.store.clock import now
from services.admission.store.database import Database
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import api_keys
from services.resource_names import check_tenant
from services.rpc.authorization import Principal, Role

_SEEN_SECONDS, _MOST_SEEN = 1.0, 10_000
_ROW = PreparedStatement(sa.select(api_keys).where(api_keys.c.id == sa.bindparam("id")))


class KeyStore:
    """Synchronous; answers are rows of `api_keys`."""

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database, self._monotonic = database, monotonic
        self._seen: dict[str, tuple[Principal, float]] = {}  # by the token's hash, and until when (monotonic)

    def create(self, tenant: str, expires: int | None, role: Role = Role.TENANT) -> tuple[Any, str]:
        """(row, the key to give to the client). An operator's key is of no tenant: `tenant` must be empty.

        Raises InvalidInputError for that, and for a tenant that is none.
        """
        if role is Role.OPERATOR and tenant:
            raise InvalidInputError.of_field("tenant", f'"{tenant}": an operator\'s key has no tenant: leave it empty')
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32).replace("_", "-")
        row = {
            "id": key_id,
            "tenant": tenant if role is Role.OPERATOR else check_tenant(tenant),
            "role": role.value,
            "secret_sha256": _hash(secret),
            "created": now(),
            "expires": expires,
        }
        with self._database.write() as connection:
            connection.execute(sa.insert(api_keys).values(row))
            return self._row(connection, key_id), f"mxt_{key_id}_{secret}"

    def ls(self, tenant: str) -> Sequence[Any]:
        with self._database.read() as connection:
            query = sa.select(api_keys).order_by(api_keys.c.created)
            return connection.execute(query.where(api_keys.c.tenant == tenant) if tenant else query).all()

    def revoke(self, key_id: str) -> Any:
        """The first revocation stands. Raises NotFoundError."""
        with self._database.write() as connection:
            if self._row(connection, key_id).revoked is None:
                connection.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(revoked=now()))
            row = self._row(connection, key_id)
        self._seen = {}  # another one: who is asking the database right now remembers nothing
        return row

    async def principal_of(self, token: str) -> Principal:
        """Remembered for a second, so a key that another process revokes is good for a second more; what this one
        revokes ends at once. Raises UnauthenticatedError, alike for malformed, unknown, wrong, expired and revoked
        keys."""
        seen, digest = self._seen, _hash(token)
        if (found := seen.get(digest)) is not None and self._monotonic() < found[1]:
            return found[0]
        principal, seconds = await self._database.query(partial(_proved, token=token))
        if len(seen) >= _MOST_SEEN:
            seen.clear()
        seen[digest] = (principal, self._monotonic() + min(seconds, _SEEN_SECONDS))
        return principal

    def _row(self, connection: sa.Connection, key_id: str) -> Any:
        row = _ROW.fetch_first(connection, id=key_id)
        if row is None:
            raise NotFoundError(f'there is no API key "{key_id}"')
        return row


def _proved(connection: sa.Connection, token: str) -> tuple[Principal, float]:
    """Whose key it is, and for how many seconds at most."""
    prefix, key_id, secret = (*token.split("_", 2), "", "")[:3]
    row = _ROW.fetch_first(connection, id=key_id)
    is_right = hmac.compare_digest(_hash(secret), row.secret_sha256 if row else _hash(""))
    left = math.inf if row is None or row.expires is None else (row.expires - now()) / 1e6
    if prefix != "mxt" or row is None or not is_right or row.revoked is not None or left <= 0:
        raise UnauthenticatedError("the API key is unknown, expired or revoked")
    return Principal(row.tenant or None, Role(row.role), f"key {key_id}"), left


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
