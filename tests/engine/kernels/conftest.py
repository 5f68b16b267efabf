"""Launchers that run the kernels' own source on this CPU."""

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.engine.kernels.host.launcher import HostLauncher

MakeLauncher = Callable[[int], HostLauncher]


@pytest.fixture(scope="session")
def host_launcher(request: pytest.FixtureRequest) -> Iterator[MakeLauncher]:
    """By seed of the order in which threads run. What is built is kept in pytest's cache."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = request.config.cache.mkdir("muxtune-kernels")  # type: ignore[union-attr]
    made: dict[int, HostLauncher] = {}

    def make(seed: int = 0) -> HostLauncher:
        if seed not in made:
            made[seed] = HostLauncher(folder, seed)
        return made[seed]

    yield make
    for launcher in made.values():
        launcher.close()
