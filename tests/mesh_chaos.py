"""Kills processes of a mesh at random while clients keep working; a supervisor restarts them."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from muxtune.local.errors import MeshError
from muxtune.local.mesh import START_ORDER, Mesh
from services.failpoints import NAMES, VARIABLE

TRAINER = "trainer"
_ARMED_SECONDS = 2.0  # a failpoint that no process passes in that time is disarmed
_POLL_SECONDS = 0.05


def long_mode() -> bool:
    return os.environ.get("MUXTUNE_TESTS") == "long"


def printed_seed() -> int:
    """Return MUXTUNE_SEED, or a new seed. It is printed: pytest shows it if the test fails."""
    seed = int(os.environ.get("MUXTUNE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"MUXTUNE_SEED={seed}")
    return seed


def trainer_of(mesh: Mesh) -> int:
    """Return the process id of the executor's trainer; 0 if it does not run."""
    server = mesh.processes["execution"].pid
    try:
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        return next((int(pid) for pid in children if b"trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()), 0)
    except OSError:
        return 0


@dataclass
class Chaos:
    """Kills processes chosen by `random`. `killed`: number of kills by service or failpoint."""

    mesh: Mesh
    random: random.Random
    killed: Counter[str] = field(default_factory=Counter)
    num_restarts: Counter[str] = field(default_factory=Counter)
    _stopping: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def supervised(self) -> Iterator["Chaos"]:
        """Restart dead services until the block ends; then wait until all of them serve."""
        thread = threading.Thread(target=self._supervise, name="supervisor")
        thread.start()
        try:
            yield self
        finally:
            self._stopping.set()
            thread.join()
        self._restart_dead_until_healthy()

    def kill_somewhere(self) -> None:
        """Kill one process at any moment, all of them at once, or the process that passes a failpoint next."""
        target = self.random.choices(
            ["failpoint", "admission", "scheduling", "alignment", "execution", TRAINER, "all"], [8, 2, 2, 2, 2, 2, 1]
        )[0]
        if target == "failpoint":
            return self._kill_at(self.random.choice(NAMES))
        self._kill_and_count(target)

    def kill_executor(self) -> None:
        """Kill the executor's server or its trainer, at any moment."""
        self._kill_and_count(self.random.choice(["execution", TRAINER]))

    def _kill_and_count(self, target: str) -> None:
        if any([self.kill(service) for service in (START_ORDER if target == "all" else [target])]):
            self.killed[target] += 1

    def kill(self, service: str) -> bool:
        """Kill a process. Return whether it was running. The trainer dies with its server."""
        pid = trainer_of(self.mesh) if service == TRAINER else self.mesh.processes[service].pid
        if not pid or (service != TRAINER and self.mesh.processes[service].poll() is not None):
            return False
        os.kill(pid, signal.SIGKILL)
        return True

    def _kill_at(self, failpoint: str) -> None:
        armed = self._failpoints / failpoint
        armed.touch()
        deadline = time.monotonic() + _ARMED_SECONDS
        while armed.exists() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        try:
            armed.unlink()
        except FileNotFoundError:
            self.killed[failpoint] += 1

    @property
    def _failpoints(self) -> Path:
        return Path(self.mesh.environment["*"][VARIABLE])

    def _restart_dead_until_healthy(self) -> None:
        """Restart what a kill ended, also if the process took until now to die of it. Raises MeshError."""
        while True:
            for service in self.mesh.dead_services():
                self.mesh.respawn(service)
            try:
                return self.mesh.await_health()
            except MeshError:
                late = set(self.mesh.dead_services().values())
                if late != {-signal.SIGKILL}:
                    raise

    def _supervise(self) -> None:
        while not self._stopping.wait(_POLL_SECONDS):
            for service in self.mesh.dead_services():
                self.num_restarts[service] += 1
                self.mesh.respawn(service)
