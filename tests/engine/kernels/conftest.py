"""Launchers that run the kernels' source on this CPU and, if there is one, on a GPU. The same tests run on both."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.kernels.cupy_launcher import CupyLauncher, launcher_of
from tests.engine.kernels.host.launcher import HostLauncher

MakeHost = Callable[[int], HostLauncher]
MakeLauncher = Callable[[int], HostLauncher | CupyLauncher]


@pytest.fixture(scope="session")
def host_launcher(request: pytest.FixtureRequest) -> Iterator[MakeHost]:
    """Return launchers by the seed of the order in which threads run. Their servers are built in pytest's cache."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = request.config.cache.mkdir("muxtune-kernels")  # type: ignore[union-attr]
    launchers: dict[int, HostLauncher] = {}

    def make(seed: int = 0) -> HostLauncher:
        if seed not in launchers:
            launchers[seed] = HostLauncher(folder, seed)
        return launchers[seed]

    yield make
    for launcher in launchers.values():
        launcher.close()


@pytest.fixture(scope="session", params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def make_launcher(request: pytest.FixtureRequest) -> MakeLauncher:
    """Return launchers by the same seed, which a GPU ignores."""
    if request.param == "host":
        host: MakeHost = request.getfixturevalue("host_launcher")
        return host
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return lambda seed: launcher_of(torch.device("cuda", 0))  # type: ignore[return-value]
