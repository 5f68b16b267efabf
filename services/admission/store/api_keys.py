"""API keys: `mxt_<id>_<secret>`. The database stores a hash of the secret; `create` shows the secret once."""

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import sqlalchemy as sa

from engine.errors import InvalidInputError, NotFoundError, UnauthenticatedError
from services.admission.store.clock import now
from services.admission.store.database import Database
from services.admission.store.pages import Page, read_page
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import api_keys
from services.resource_names import check_tenant
from services.rpc.authorization import Principal, Role

_CACHE_SECONDS, _MAX_CACHED = 1.0, 10_000
_ROW = PreparedStatement(sa.select(api_keys).where(api_keys.c.id == sa.bindparam("id")))


class KeyStore:
    """Creates, lists, revokes and verifies keys; returns rows of `api_keys`. Synchronous but for `authenticate`."""

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database, self._monotonic = database, monotonic
        self._cache: dict[str, tuple[Principal, float]] = {}  # token's hash -> (principal, monotonic expiry)

    def create(self, tenant: str, expires: int | None, role: Role = Role.TENANT) -> tuple[Any, str]:
        """Return (row, key for the client). Raises InvalidInputError for a malformed tenant, and for an operator's key
        with a tenant."""
        if role is Role.OPERATOR and tenant:
            raise InvalidInputError.of_field("tenant", f'"{tenant}" must be empty for a key of an operator')
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

    def list_page(self, tenant: str, after: tuple[int, str] | None, size: int) -> Page:
        """Return keys of the tenant, or of all tenants if it is empty, oldest first. `after`: (created, id) of the last
        key of the page before."""
        query = sa.select(api_keys).order_by(api_keys.c.created, api_keys.c.id)
        if tenant:
            query = query.where(api_keys.c.tenant == tenant)
        if after:
            query = query.where(sa.tuple_(api_keys.c.created, api_keys.c.id) > sa.tuple_(*map(sa.literal, after)))
        with self._database.read() as connection:
            return read_page(connection, query, size)

    def revoke(self, key_id: str) -> Any:
        """Revoke the key; a second call keeps the time of the first. Raises NotFoundError."""
        with self._database.write() as connection:
            if self._row(connection, key_id).revoked is None:
                connection.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(revoked=now()))
            row = self._row(connection, key_id)
        self._cache = {}  # a new dict, because reads in flight still fill the old one
        return row

    async def authenticate(self, token: str) -> Principal:
        """Return the principal of an API key. Raises UnauthenticatedError, which does not show whether the key is
        malformed, unknown, wrong, expired or revoked.

        Results are cached for a second: a key that another process revokes remains valid for at most that long, one
        that this process revokes ends at once.
        """
        cache, digest = self._cache, _hash(token)
        cached = cache.get(digest)
        if cached is not None and self._monotonic() < cached[1]:
            return cached[0]
        principal, seconds = await self._database.query(partial(_verify, token=token))
        if len(cache) >= _MAX_CACHED:
            cache.clear()
        cache[digest] = (principal, self._monotonic() + min(seconds, _CACHE_SECONDS))
        return principal

    def _row(self, connection: sa.Connection, key_id: str) -> Any:
        row = _ROW.fetch_first(connection, id=key_id)
        if row is None:
            raise NotFoundError(f'API key "{key_id}" does not exist: check its id with ListApiKeys')
        return row


def _verify(connection: sa.Connection, token: str) -> tuple[Principal, float]:
    """Return the key's principal and the seconds until the key expires. Raises UnauthenticatedError."""
    prefix, key_id, secret = (*token.split("_", 2), "", "")[:3]
    row = _ROW.fetch_first(connection, id=key_id)
    is_secret_correct = hmac.compare_digest(_hash(secret), row.secret_sha256 if row else _hash(""))
    seconds_left = math.inf if row is None or row.expires is None else (row.expires - now()) / 1e6
    if prefix != "mxt" or row is None or not is_secret_correct or row.revoked is not None or seconds_left <= 0:
        raise UnauthenticatedError("the API key is unknown, expired or revoked")
    return Principal(row.tenant or None, Role(row.role), f"key {key_id}"), seconds_left


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
