"""API keys are shown once, stored as a hash, and valid until they expire or are revoked."""

import asyncio
import time
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import UnauthenticatedError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import key_pb2
from services.admission.store import api_keys as api_key_store
from services.admission.store import clock
from services.admission.store.api_keys import KeyStore
from services.admission.store.tables import api_keys
from tests.services.admission.admission_mesh import DATABASES, Admission, refused

pytestmark = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
UNKNOWN = (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")


async def make(admission: Admission, tenant: str = "tenants/acme", **fields: Any) -> key_pb2.CreateApiKeyResponse:
    request = key_pb2.CreateApiKeyRequest(tenant=tenant, **fields)
    answer: key_pb2.CreateApiKeyResponse = await admission.keys().CreateApiKey(request)
    return answer


async def use(admission: Admission, secret: str) -> None:
    await admission.with_token(secret).ListTasks(pb.ListTasksRequest())


async def listed(admission: Admission, tenant: str = "") -> list[str]:
    answer = await admission.keys().ListApiKeys(key_pb2.ListApiKeysRequest(tenant=tenant))
    return [key.id for key in answer.keys]


async def test_a_key_authenticates_its_tenant_after_a_restart(admission: Admission) -> None:
    first, second = await make(admission), await make(admission)
    other = await make(admission, "tenants/other")
    assert first.key.tenant == "tenants/acme" and first.secret.startswith(f"mxt_{first.key.id}_")
    await admission.restart()
    for created in (first, second, other):
        await use(admission, created.secret)
    assert await listed(admission, "tenants/acme") == [first.key.id, second.key.id]
    assert await listed(admission) == [first.key.id, second.key.id, other.key.id]
    assert await listed(admission, "tenants/none") == []


async def test_the_secret_is_nowhere_in_the_store(admission: Admission) -> None:
    created = await make(admission)
    part = created.secret.split("_", 2)[2]
    with admission.database.read() as connection:
        (row,) = connection.execute(sa.select(api_keys)).all()
    assert len(part) >= 40 and not any(part in str(value) for value in row)
    keys = (await admission.keys().ListApiKeys(key_pb2.ListApiKeysRequest())).keys
    assert part not in str(keys)
    mixed = created.secret.replace(part, (await make(admission)).secret.split("_", 2)[2])
    with refused(*UNKNOWN):  # one key's id with another's secret
        await use(admission, mixed)


async def test_a_revoked_key_is_refused_and_keeps_its_first_revocation(admission: Admission) -> None:
    revoked, valid = await make(admission), await make(admission)
    request = key_pb2.RevokeApiKeyRequest(id=revoked.key.id)
    first = await admission.keys().RevokeApiKey(request)
    assert first.key.HasField("revoke_time")
    assert await admission.keys().RevokeApiKey(request) == first
    with refused(*UNKNOWN):
        await use(admission, revoked.secret)
    await use(admission, valid.secret)
    for unknown in ("", "nosuch"):
        with refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"):
            await admission.keys().RevokeApiKey(key_pb2.RevokeApiKeyRequest(id=unknown))


async def test_a_key_that_another_process_revokes_is_good_for_a_second_at_most(admission: Admission) -> None:
    seconds = [0.0]
    here, other = KeyStore(admission.database, lambda: seconds[0]), KeyStore(admission.database)
    row, token = here.create("tenants/acme", None)
    assert (await here.authenticate(token)).tenant == "tenants/acme"
    other.revoke(row.id)
    seconds[0] = 1.0
    for store in (here, other):
        with pytest.raises(UnauthenticatedError):
            await store.authenticate(token)
    row, token = here.create("tenants/acme", None)
    await here.authenticate(token)
    here.revoke(row.id)  # its own end at once
    with pytest.raises(UnauthenticatedError):
        await here.authenticate(token)


async def test_a_key_is_not_cached_beyond_its_expiry(admission: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, start = [0.0], clock.now()
    monkeypatch.setattr(api_key_store, "now", lambda: start + int(seconds[0] * 1e6))
    store = KeyStore(admission.database, lambda: seconds[0])
    _, token = store.create("tenants/acme", start + 500_000)
    await store.authenticate(token)
    seconds[0] = 0.4
    await store.authenticate(token)
    seconds[0] = 0.5
    with pytest.raises(UnauthenticatedError):
        await store.authenticate(token)


async def test_a_key_revoked_while_it_is_looked_up_is_not_cached(admission: Admission) -> None:
    store = KeyStore(admission.database)
    row, token = store.create("tenants/acme", None)
    looking = asyncio.ensure_future(store.authenticate(token))
    await asyncio.sleep(0)
    store.revoke(row.id)
    await asyncio.gather(looking, return_exceptions=True)
    with pytest.raises(UnauthenticatedError):
        await store.authenticate(token)


async def test_a_key_expires(admission: Admission) -> None:
    now = int(time.time())
    later = await make(admission, expire_time=Timestamp(seconds=now + 3600))
    assert later.key.expire_time.seconds == now + 3600
    await use(admission, later.secret)
    for seconds in (now - 1, 1, 0, -1):
        past = await make(admission, expire_time=Timestamp(seconds=seconds))
        assert past.key.expire_time.seconds == seconds
        with refused(*UNKNOWN):
            await use(admission, past.secret)


async def test_an_invalid_tenant_or_time_is_refused(admission: Admission) -> None:
    for tenant in (
        "",
        "acme",
        "tenants/",
        "tenants/A",
        "tenants/a/b",
        "tenants/a\0",
        "tenants/-a",
        "tenants/" + "a" * 64,
    ):
        with refused(*INVALID) as refusal:
            await make(admission, tenant)
        assert refusal.fields == ["tenant"]
    for time_ in (Timestamp(seconds=2**60), Timestamp(seconds=-(2**60)), Timestamp(nanos=-5)):
        with refused(*INVALID) as refusal:
            await make(admission, expire_time=time_)
        assert refusal.fields == ["expire_time"]
    assert await listed(admission) == []
