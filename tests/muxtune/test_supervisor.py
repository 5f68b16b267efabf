"""When the supervisor restarts a service, and when it gives up; tests/test_up.py has it with real processes."""

import pytest

from muxtune.local.errors import MeshError
from muxtune.local.mesh import START_ORDER
from muxtune.local.supervisor import Supervisor


class FakeMesh:
    """Services that end as the test says; a service that is respawned is healthy unless it is in `ill`."""

    ready_seconds = 600.0

    def __init__(self) -> None:
        self.dead: dict[str, int] = {}
        self.ill: set[str] = set()
        self.respawned: list[str] = []
        self.killed: list[str] = []
        self.processes = {service: FakeProcess(self, service) for service in START_ORDER}

    def dead_services(self) -> dict[str, int]:
        return dict(self.dead)

    def describe_end(self, service: str, code: int) -> str:
        return f"{service} ended with status {code}"

    def respawn(self, service: str) -> None:
        del self.dead[service]
        self.respawned.append(service)

    def is_serving(self, service: str) -> bool:
        return service not in self.ill


class FakeProcess:
    def __init__(self, mesh: FakeMesh, service: str) -> None:
        self._mesh, self._service = mesh, service

    def kill(self) -> None:
        self._mesh.killed.append(self._service)
        self._mesh.dead[self._service] = -9


class Run:
    """A supervisor of a fake mesh, on a clock that the test turns."""

    def __init__(self) -> None:
        self.mesh, self.lines, self.seconds = FakeMesh(), list[str](), 1000.0
        self.supervisor = Supervisor(self.mesh, self.lines.append, lambda: self.seconds)  # type: ignore[arg-type]

    def check_for(self, seconds: float) -> None:
        end = self.seconds + seconds
        while self.seconds < end:
            self.seconds += 0.5
            self.supervisor.check()


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_all_that_died_at_once_are_restarted_at_once(run: Run, number: int) -> None:
    run.mesh.dead = dict.fromkeys(START_ORDER[:number], -9)
    run.supervisor.check()
    assert sorted(run.mesh.respawned) == sorted(START_ORDER[:number])
    run.check_for(10)
    assert sum("is restarted and healthy" in line for line in run.lines) == number


def test_a_service_that_dies_at_once_each_time_ends_the_mesh_with_its_cause(run: Run) -> None:
    with pytest.raises(
        MeshError, match=r"alignment was restarted 5 times within 5 minutes; alignment ended with status 3"
    ):
        for _ in range(1000):
            run.mesh.dead["alignment"] = 3
            run.check_for(1)
    assert run.mesh.respawned == ["alignment"] * 5
    assert 20 < run.seconds - 1000 < 120  # with longer and longer pauses


def test_restarts_are_counted_by_time_and_for_each_service(run: Run) -> None:
    for _ in range(20):
        for service in START_ORDER:
            run.mesh.dead[service] = -9
        run.check_for(100)
    assert len(run.mesh.respawned) == 20 * len(START_ORDER)


def test_a_service_that_dies_while_another_waits_for_its_restart_is_not_held_up(run: Run) -> None:
    for _ in range(4):
        run.mesh.dead["admission"] = 1
        run.check_for(5)
    run.mesh.dead = {"admission": 1, "scheduling": -9}
    run.mesh.respawned.clear()
    run.supervisor.check()
    assert run.mesh.respawned == ["scheduling"]
    run.check_for(20)
    assert run.mesh.respawned == ["scheduling", "admission"]


def test_a_service_that_stays_unhealthy_is_killed_and_restarted(run: Run) -> None:
    run.mesh.ill = {"admission", "execution"}  # admission leads no ledger; the executor loads its backbone
    run.check_for(50)
    assert not run.mesh.killed
    run.check_for(20)
    assert run.mesh.killed == run.mesh.respawned == ["admission"]
    assert any("admission was not healthy for 6" in line for line in run.lines)
    run.check_for(540)
    assert run.mesh.killed == ["admission", "execution"], "a start may take ready_seconds"


def test_a_moment_of_bad_health_after_a_long_pause_of_this_process_kills_nothing(run: Run) -> None:
    run.mesh.ill = {"admission"}
    run.seconds += 3600  # it was stopped, perhaps with its services
    run.supervisor.check()
    assert not run.mesh.killed
