"""Idempotent requests (AIP-155): a repeated `request_id` gets the same answer; with another body it is refused."""

import hashlib
import re

import sqlalchemy as sa

from engine.errors import InvalidInputError, RequestIdReusedError
from services.admission.store.clock import now
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import requests

_SELECT = PreparedStatement(
    sa.select(requests).where(
        requests.c.tenant == sa.bindparam("tenant"), requests.c.request_id == sa.bindparam("request_id")
    )
)
_COLUMNS = [column.name for column in requests.c]
_INSERT = PreparedStatement(
    sa.text(f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES (:{', :'.join(_COLUMNS)}) ON CONFLICT DO NOTHING")
)
_ID = re.compile(r"[!-~]{1,128}")


def hash_parts(*parts: bytes) -> str:
    """Return a hash of the parts, which keeps their boundaries."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def find_resource(connection: sa.Connection, tenant: str, request_id: str, method: str, body: str) -> str | None:
    """Return the name of the resource that the request created before, or None if the request is new.

    `body`: hash of everything in the request but its id. Raises RequestIdReusedError for another body, and
    InvalidInputError for a malformed id.
    """
    if not request_id:
        return None
    if not _ID.fullmatch(request_id):
        raise InvalidInputError.of_field("request_id", "must be at most 128 visible ASCII characters: use a UUID")
    row = _SELECT.fetch_first(connection, tenant=tenant, request_id=request_id)
    if row is None:
        return None
    if (row.method, row.body_sha256) != (method, body):
        raise RequestIdReusedError(f'request_id "{request_id}" was used before for another request: use a new id')
    resource: str = row.resource
    return resource


def has_request(connection: sa.Connection, tenant: str, request_id: str) -> bool:
    """Return whether a request of this id created something, with any body. False for a malformed id."""
    if not _ID.fullmatch(request_id):
        return False
    query = sa.select(requests.c.request_id).filter_by(tenant=tenant, request_id=request_id)
    return connection.execute(query).first() is not None


def record_request(
    connection: sa.Connection, tenant: str, request_id: str, method: str, body: str, resource: str
) -> bool:
    """Record that the request created the resource, in the transaction that creates it. Return False and change nothing
    if the id was used before."""
    if not request_id:
        return True
    values = {"tenant": tenant, "request_id": request_id, "method": method, "body_sha256": body}
    return _INSERT.execute(connection, **values, resource=resource, created=now()) == 1
