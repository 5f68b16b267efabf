"""Runs the compose file without Docker: each container's command with its environment, and with loopback and a
temporary folder in place of host names and volumes."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from muxtune.client import Client
from muxtune.local.loopback import free_addresses
from muxtune.v1 import task_pb2
from services.rpc.certificates import Certificates, ClientTls
from services.rpc.health import is_serving
from tests.deploy.compose_file import ROOT, SERVICES, compose, environment_of_image, last_of
from tests.tiny_backbone import write_backbone


class Machine:
    """Replaces the containers' host names by loopback ports, and their volumes by a folder."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        variables = {"MUXTUNE_BACKBONE_SOURCE": str(source), "MUXTUNE_BACKBONE_NAME": "tiny"}
        self.services = compose(variables)["services"]
        ports = iter(free_ports(2 * len(SERVICES) + 2))
        self.ports = {service: (next(ports), next(ports)) for service in SERVICES}
        self.internal_port, self.closed_port = ports
        self.source = source

    def environment(self, service: str) -> dict[str, str]:
        """Return the container's environment with paths and addresses of this machine."""
        inside = environment_of_image(service) | self.services[service]["environment"]
        variables = {name: self.here(str(value)) for name, value in inside.items() if name.startswith("MUXTUNE_")}
        grpc_port, metrics_port = self.ports[service]
        variables |= {"MUXTUNE_LISTEN": f"127.0.0.1:{grpc_port}", "MUXTUNE_PROMETHEUS_PORT": str(metrics_port)}
        if service == "admission":
            variables["MUXTUNE_INTERNAL_LISTEN"] = f"127.0.0.1:{self.internal_port}"
        if service == "execution":
            variables["MUXTUNE_CALIBRATION_SECONDS"] = "0.1"
        return self.outside(variables | {"MUXTUNE_CERTS": str(self.certs(service))})

    def operator(self) -> dict[str, str]:
        """As in the operator's container."""
        inside = self.services["operator"]["environment"]
        variables = {name: self.here(str(value)) for name, value in inside.items()}
        return self.outside(variables | {"MUXTUNE_CERTS": str(self.certs("operator"))})

    def outside(self, variables: dict[str, str]) -> dict[str, str]:
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("MUXTUNE_")},
            **variables,
            "PYTHONPATH": str(ROOT),
        }

    def certs(self, name: str) -> Path:
        """What the volume certs-{name} holds."""
        return self.folder / "ca" / ("executors/local" if name == "execution" else name)

    def here(self, text: str) -> str:
        text = text.replace("admission:7411", f"127.0.0.1:{self.internal_port}")
        for service, (port, _) in self.ports.items():
            inside = environment_of_image(service)["MUXTUNE_LISTEN"].rpartition(":")[2]
            text = text.replace(f"{service}:{inside}", f"127.0.0.1:{port}")
        # Jaeger is away: nothing may depend on it.
        text = text.replace("http://jaeger:4317", f"http://127.0.0.1:{self.closed_port}")
        return text.replace("/var/lib/muxtune", str(self.folder)).replace("/source/", f"{self.source}/")

    def start(self, service: str) -> "subprocess.Popen[bytes]":
        for volume in self.services[service].get("volumes", []):
            Path(self.here(volume.split(":")[1])).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *json.loads(last_of(service, "CMD"))[1:]]
        log = (self.folder / f"{service}.log").open("ab")
        return subprocess.Popen(command, env=self.environment(service), cwd=self.folder, stdout=log, stderr=log)


def free_ports(count: int) -> list[int]:
    return [int(address.rpartition(":")[2]) for address in free_addresses(map(str, range(count))).values()]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    source = write_backbone(tmp_path_factory.mktemp("source"))
    machine = Machine(tmp_path_factory.mktemp("deploy"), source)
    command = [machine.here(str(part)) for part in machine.services["prepare"]["command"]]
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True, capture_output=True)
    command = [machine.here(str(part)) for part in machine.services["certs"]["command"]]
    subprocess.run([sys.executable, "-m", "muxtune.cli.main", *command[1:]], cwd=ROOT, check=True, capture_output=True)
    processes = []
    try:
        for service in SERVICES:  # in the order that depends_on asks for
            processes.append(machine.start(service))
            wait_until_healthy(machine, service, processes[-1])
        yield machine
    finally:
        for process in reversed(processes):
            process.terminate()
        codes = [process.wait(60) for process in processes]
    assert codes == [0, 0, 0, 0]


def wait_until_healthy(machine: Machine, service: str, process: "subprocess.Popen[bytes]") -> None:
    """As Docker asks: the image's own check, again and again."""
    address = f"127.0.0.1:{machine.ports[service][0]}"
    while not is_serving(address, ClientTls(Certificates(machine.certs(service)), service)):
        assert process.poll() is None, (machine.folder / f"{service}.log").read_text()[-2000:]


def test_the_order_is_the_one_compose_keeps(machine: Machine) -> None:
    for place, service in enumerate(SERVICES):
        needed = set(machine.services[service].get("depends_on", {})) - {"prepare", "certs"}
        assert needed <= set(SERVICES[:place])


def test_a_key_made_by_the_operator_trains_a_task(machine: Machine, tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "muxtune.cli.main", "key", "create", "acme", "--json"],
        env=machine.operator(), cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    key = json.loads(completed.stdout)["secret"]
    with Client(f"localhost:{machine.ports['admission'][0]}", key, machine.folder / "ca" / "ca.crt") as client:
        dataset = client.upload_dataset([{"prompt": f"fox {i}", "completion": " jumps"} for i in range(8)])
        while not any(backbone.num_executors for backbone in client.list_backbones()):
            pass
        spec = task_pb2.TaskSpec(
            backbone="tiny", dataset=dataset.name,
            lora=task_pb2.Lora(rank=2, target_modules=["q_proj"]),
            training=task_pb2.Training(learning_rate=0.01, num_steps=3, global_batch_size=2, max_sequence_tokens=32),
        )  # fmt: skip
        task = client.wait_task(client.create_task(spec).name)
        assert task.state == task_pb2.TASK_STATE_SUCCEEDED
        assert client.download_adapter(task.name, tmp_path / "adapter").is_dir()


def test_prometheus_finds_metrics_where_it_looks(machine: Machine) -> None:
    for service in SERVICES:
        with urllib.request.urlopen(f"http://127.0.0.1:{machine.ports[service][1]}/metrics", timeout=10) as answer:
            page = answer.read().decode()
        wanted = "muxtune_steps_total{" if service == "execution" else "rpc_server_call_duration"
        assert wanted in page


def test_the_health_check_fails_without_a_server(capfd: pytest.CaptureFixture[str]) -> None:
    assert not is_serving(f"127.0.0.1:{free_ports(1)[0]}")
    assert "UNAVAILABLE" in capfd.readouterr().err
