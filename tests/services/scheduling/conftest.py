from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.services.scheduling.mesh_fakes import SchedulingMesh


@pytest.fixture
async def mesh() -> AsyncIterator[SchedulingMesh]:
    async with AsyncExitStack() as stack:
        yield SchedulingMesh(stack)
