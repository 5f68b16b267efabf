"""A mesh with two admissions, "a" and "b", on one PostgreSQL. They can be killed, paused, cut off and restarted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import psycopg
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxtune.client import Client
from muxtune.local.loopback import free_addresses
from muxtune.local.mesh import Mesh, secure_channel
from services.admission.ledger.replicas import SESSION
from services.admission.ledger_leader import LEDGER_SERVICE
from services.admission.store.database import Database

NAMES = ("a", "b")
_WAIT_SECONDS = 60.0


class ReplicatedMesh:
    """Runs the mesh; `environment` is that of `Mesh`. Clients know one admission or both; scheduling knows both."""

    def __init__(
        self, folder: Path, backbone: Path, url: str, environment: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        self.folder, self.url = folder, url
        doors = list(free_addresses(f"{name} {door}" for door in ("public", "internal") for name in NAMES).values())
        self.public, self.internal = dict(zip(NAMES, doors[:2], strict=True)), dict(zip(NAMES, doors[2:], strict=True))
        folder.mkdir(parents=True)
        addresses = {"admission": self.public["a"], "admission_internal": self.internal["a"]}
        (folder / "mesh.json").write_text(json.dumps({"addresses": addresses}))
        by_service = {name: dict(settings) for name, settings in (environment or {}).items()}
        by_service.setdefault("admission", {})["MUXTUNE_DATABASE_URL"] = url
        by_service.setdefault("scheduling", {})["MUXTUNE_ADMISSION_ADDRESS"] = ",".join(self.internal.values())
        self.mesh = Mesh(folder, {"tiny": backbone}, environment=by_service)
        self._b: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ReplicatedMesh":
        self.mesh.start()
        assert {"admission": self.public["a"]}.items() <= self.mesh.addresses.items(), "its port was taken meanwhile"
        self.start("b")
        self.await_serving("b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.mesh.stop()
        if self._b is not None:
            self._b.kill()
            self._b.wait()

    def client(self, *names: str) -> Client:
        """Return a client that knows these admissions, by default both."""
        return Client(",".join(self.public[name] for name in names or NAMES), self.mesh.api_key, self.mesh.ca)

    def process(self, name: str) -> "subprocess.Popen[bytes]":
        process = self.mesh.processes["admission"] if name == "a" else self._b
        assert process is not None
        return process

    def start(self, name: str) -> None:
        """Start an admission at its former addresses, without waiting until it serves."""
        if name == "a":
            return self.mesh.respawn("admission")
        settings = self.mesh._settings("admission", {"tiny": self.mesh.backbone_folder("tiny")})
        settings |= {"MUXTUNE_LISTEN": self.public["b"], "MUXTUNE_INTERNAL_LISTEN": self.internal["b"]}
        environment = {**self.mesh.environment.get("*", {}), **self.mesh.environment["admission"]}
        with self.mesh.log_of("admission-b").open("ab") as log:
            command = [sys.executable, "-m", "services.admission"]
            self._b = subprocess.Popen(command, env={**os.environ, **settings, **environment}, stdout=log, stderr=log)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.process(name).send_signal(number)

    def kill(self, name: str) -> None:
        """Kill an admission with SIGKILL and start it again."""
        self.signal(name, signal.SIGKILL)
        self.process(name).wait()
        self.start(name)

    def restart(self, name: str) -> None:
        """Restart an admission as a rolling restart does: SIGTERM, wait for its end, start, wait until it serves."""
        self.signal(name, signal.SIGTERM)
        assert self.process(name).wait(_WAIT_SECONDS) == 0
        self.start(name)
        self.await_serving(name)

    def cut(self, *, only_sessions: bool = False) -> int:
        """End the connections of all admissions to the database. Return their number."""
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        query += " AND pid <> pg_backend_pid()"
        if only_sessions:
            query += f" AND application_name = '{SESSION}'"
        with self.postgres() as connection:
            return len(connection.execute(query).fetchall())  # type: ignore[arg-type]

    def postgres(self) -> "psycopg.Connection[Any]":
        database = Database(self.url)
        try:
            return psycopg.connect(**database.connect_arguments(), autocommit=True)
        finally:
            database.close()

    def is_serving(self, name: str, service: str = "") -> bool:
        with secure_channel(self.internal[name], self.mesh.certs / "operator", "admission") as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)  # type: ignore[attr-defined]
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def await_serving(self, *names: str) -> None:
        _await(lambda: all(self.is_serving(name) for name in names), f"{names} to serve")

    def await_leader(self, *among: str) -> str:
        """Return the replica that leads the ledger."""
        leaders: list[str] = []

        def has_one_leader() -> bool:
            leaders[:] = [name for name in among or NAMES if self.is_serving(name, LEDGER_SERVICE)]
            return len(leaders) == 1

        _await(has_one_leader, f"one of {among or NAMES} to lead the ledger")
        return leaders[0]


def _await(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
