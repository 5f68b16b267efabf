"""Keeps the services of a mesh running: restarts those that end or stay unhealthy, for `muxtune up`."""

import time
from collections import defaultdict, deque
from collections.abc import Callable

from muxtune.local.errors import MeshError
from muxtune.local.mesh import START_ORDER, Mesh

_MAX_RESTARTS, _WINDOW_SECONDS = 5, 300.0  # of each service
_MAX_BACKOFF_SECONDS = 16.0
_HEALTH_SECONDS, _STARTING_SECONDS = 5.0, 1.0  # between health checks; while a service starts
_MAX_CHECK_SECONDS = 10.0  # after a longer pause this process was stopped, perhaps with its services
_UNHEALTHY_SECONDS = 60.0


class Supervisor:
    """Call `check` often. Services are restarted independently of each other; `report` receives a line on each change.

    A service is restarted at once, and after a pause if it was restarted before within five minutes.
    """

    def __init__(self, mesh: Mesh, report: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._mesh, self._report, self._clock = mesh, report, clock
        self._restarts: dict[str, deque[float]] = defaultdict(deque)  # when each service was restarted, lately
        self._due: dict[str, float] = {}  # when to restart services that have ended
        self._starting: set[str] = set()
        self._unhealthy_seconds = dict.fromkeys(START_ORDER, 0.0)
        self._health_checked_at = clock()

    def check(self) -> None:
        """Restart what has ended. Raises MeshError if a service was restarted too often and has ended again."""
        for service, code in self._mesh.dead_services().items():
            if service not in self._due:
                self._due[service] = self._clock() + self._backoff(service, self._mesh.describe_end(service, code))
        for service in [service for service, due in self._due.items() if due <= self._clock()]:
            del self._due[service]
            self._restart(service)
        seconds = self._clock() - self._health_checked_at
        if seconds >= (_STARTING_SECONDS if self._starting else _HEALTH_SECONDS):
            self._health_checked_at += seconds
            self._check_health(min(seconds, _MAX_CHECK_SECONDS))

    def _backoff(self, service: str, end: str) -> float:
        """Return the seconds to wait before the service is restarted. Raises MeshError after too many restarts."""
        restarts, now = self._restarts[service], self._clock()
        while restarts and now - restarts[0] > _WINDOW_SECONDS:
            restarts.popleft()
        if len(restarts) >= _MAX_RESTARTS:
            raise MeshError(
                f"{service} was restarted {len(restarts)} times within {_WINDOW_SECONDS / 60:g} minutes; {end}"
            )
        self._report(end)
        return min(2.0 ** (len(restarts) - 1), _MAX_BACKOFF_SECONDS) if restarts else 0.0

    def _restart(self, service: str) -> None:
        self._mesh.respawn(service)
        self._restarts[service].append(self._clock())
        self._unhealthy_seconds[service] = 0.0
        self._starting.add(service)

    def _check_health(self, seconds: float) -> None:
        """`seconds`: since the last check. Kill a service that has been unhealthy for too long; `check` restarts it."""
        for service in (service for service in START_ORDER if service not in self._due):
            if self._mesh.is_serving(service):
                self._unhealthy_seconds[service] = 0.0
                if service in self._starting:
                    self._starting.remove(service)
                    self._report(f"{service} is restarted and healthy")
                continue
            self._unhealthy_seconds[service] += seconds
            if self._unhealthy_seconds[service] > self._patience(service):
                self._report(f"{service} was not healthy for {self._unhealthy_seconds[service]:.0f} s and is killed")
                self._mesh.processes[service].kill()

    def _patience(self, service: str) -> float:
        """Return how long the service may be unhealthy. The executor loads its backbone again if its trainer died."""
        is_loading = service == "execution" or service in self._starting
        return self._mesh.ready_seconds if is_loading else _UNHEALTHY_SECONDS
