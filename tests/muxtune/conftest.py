"""Fixtures: both clients behind one awaitable interface, and the fake admission that they call."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from muxtune.aio import AsyncClient
from muxtune.client import Client
from tests.muxtune.admission_fake import KEY, Admission


class Either:
    """Calls the blocking client in a thread, or awaits the asyncio one; streams are returned as lists."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    async def __call__(self, method: str, *arguments: Any, **named: Any) -> Any:
        if isinstance(self.client, Client):
            return await asyncio.to_thread(self._blocking, method, arguments, named)
        answer = getattr(self.client, method)(*arguments, **named)
        return [item async for item in answer] if hasattr(answer, "__aiter__") else await answer

    def _blocking(self, method: str, arguments: Any, named: Any) -> Any:
        answer = getattr(self.client, method)(*arguments, **named)
        return list(answer) if isinstance(answer, Iterator) else answer


@pytest.fixture
def admission() -> Iterator[Admission]:
    played = Admission()
    yield played
    played.close()


@pytest.fixture(params=["blocking", "asyncio"])
async def call(request: pytest.FixtureRequest, admission: Admission) -> AsyncIterator[Either]:
    if request.param == "blocking":
        with Client(admission.address, KEY) as client:
            yield Either(client)
    else:
        async with AsyncClient(admission.address, KEY) as asynchronous:
            yield Either(asynchronous)
