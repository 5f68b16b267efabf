"""API keys: `mxt_<id>_<secret>`. Only a hash of the secret is kept; the secret itself is shown once."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from engine.errors import InvalidInputError, NotFoundError, UnauthenticatedError
from services.access import Role
from services.admission.clock import now
from services.admission.database import Database
from services.admission.names import check_tenant
from services.admission.tables import api_keys
from services.auth import Principal


class KeyStore:
    """Synchronous; answers are rows of `api_keys`."""

    def __init__(self, database: Database) -> None:
        self._database = database

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
            return self._row(connection, key_id)

    def principal_of(self, token: str) -> Principal:
        """Raises UnauthenticatedError, alike for malformed, unknown, wrong, expired and revoked keys."""
        prefix, key_id, secret = (*token.split("_", 2), "", "")[:3]
        with self._database.read() as connection:
            row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        is_right = hmac.compare_digest(_hash(secret), row.secret_sha256 if row else _hash(""))
        is_ended = row is not None and (row.revoked is not None or (row.expires is not None and row.expires <= now()))
        if prefix != "mxt" or row is None or not is_right or is_ended:
            raise UnauthenticatedError("the API key is unknown, expired or revoked")
        return Principal(row.tenant or None, Role(row.role), f"key {key_id}")

    def _row(self, connection: sa.Connection, key_id: str) -> Any:
        row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise NotFoundError(f'there is no API key "{key_id}"')
        return row


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
