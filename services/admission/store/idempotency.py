"""`request_id` (AIP-155): the same id with the same body gives the same answer; with another body it is refused."""

import hashlib
import re

import sqlalchemy as sa

from engine.errors import InvalidInputError, RequestIdReusedError
from services.admission.store.clock import now
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import requests

_FOUND = PreparedStatement(
    sa.select(requests).where(
        requests.c.tenant == sa.bindparam("tenant"), requests.c.request_id == sa.bindparam("request_id")
    )
)
_COLUMNS = [column.name for column in requests.c]
_INSERT = PreparedStatement(
    sa.text(f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES (:{', :'.join(_COLUMNS)}) ON CONFLICT DO NOTHING")
)
_ID = re.compile(r"[!-~]{1,128}")


def body_hash(*parts: bytes) -> str:
    """Of everything that the request asks for, its id left out."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def find(connection: sa.Connection, tenant: str, request_id: str, method: str, body: str) -> str | None:
    """Name of the resource that this request made before; None if it is new.

    Raises RequestIdReusedError, and InvalidInputError for an id that is none.
    """
    if not request_id:
        return None
    if not _ID.fullmatch(request_id):
        raise InvalidInputError.of_field("request_id", "must be at most 128 visible ASCII characters: make it a UUID")
    row = _FOUND.fetch_first(connection, tenant=tenant, request_id=request_id)
    if row is None:
        return None
    if (row.method, row.body_sha256) != (method, body):
        raise RequestIdReusedError(f'request_id "{request_id}" was used before for another request: make a new one')
    resource: str = row.resource
    return resource


def is_known(connection: sa.Connection, tenant: str, request_id: str) -> bool:
    """Whether a request of this id made something, whatever its body. An id that is none made nothing."""
    if not _ID.fullmatch(request_id):
        return False
    query = sa.select(requests.c.request_id).filter_by(tenant=tenant, request_id=request_id)
    return connection.execute(query).first() is not None


def remember(connection: sa.Connection, tenant: str, request_id: str, method: str, body: str, resource: str) -> bool:
    """In the transaction that makes the resource. False, and nothing is changed, where the id was used before."""
    if not request_id:
        return True
    values = {"tenant": tenant, "request_id": request_id, "method": method, "body_sha256": body}
    return _INSERT.execute(connection, **values, resource=resource, created=now()) == 1
