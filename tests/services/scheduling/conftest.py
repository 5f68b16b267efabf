from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.services.scheduling.mesh_fakes import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(stack)
