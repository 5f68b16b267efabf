"""The files in deploy/ are well-formed, and name only settings, ports, targets and files that exist."""

import dataclasses
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from compose_spec import ComposeSpecification
from pydantic import ValidationError

from services.admission.__main__ import AdmissionSettings
from services.alignment.__main__ import AlignmentSettings
from services.execution.settings import ExecutionSettings
from services.scheduling.__main__ import SchedulingSettings
from services.settings import from_environment
from tests.deploy.compose_file import (
    DEPLOY,
    ROOT,
    SERVICES,
    compose,
    environment_of_image,
    filled_in,
    image_of,
    last_of,
    stages,
)

SETTINGS = {
    "admission": AdmissionSettings,
    "scheduling": SchedulingSettings,
    "alignment": AlignmentSettings,
    "execution": ExecutionSettings,
}
FILLED = {"MUXTUNE_BACKBONE_SOURCE": "/models/tiny"}
INTERNAL_PORT = "7411"  # of admission: for services and operators


def test_the_dockerfile_passes_hadolint() -> None:
    command = [Path(sys.executable).parent / "hadolint", DEPLOY / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_hadolint_is_alive() -> None:
    command = [Path(sys.executable).parent / "hadolint", "-"]
    done = subprocess.run(command, input="FROM debian\nRUN cd /tmp\n", capture_output=True, text=True, check=False)
    assert done.returncode != 0


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_follow_the_specification(name: str) -> None:
    ComposeSpecification(**compose(FILLED, name))


def test_the_specification_is_alive() -> None:
    wrong = compose(FILLED)
    wrong["services"]["admission"]["restart"] = ["never"]
    with pytest.raises((ValidationError, TypeError)):
        ComposeSpecification(**wrong)


def test_a_missing_required_variable_is_an_error() -> None:
    for missing in FILLED:
        with pytest.raises(AssertionError, match=missing):
            compose({name: value for name, value in FILLED.items() if name != missing})
    example = (DEPLOY / ".env.example").read_text()
    assert all(re.search(rf"^{name}=$", example, re.MULTILINE) for name in FILLED)
    variables = set(re.findall(r"\$\{(\w+)", "".join(path.read_text() for path in DEPLOY.glob("compose*.yaml"))))
    assert variables == set(re.findall(r"^(?:# )?(MUXTUNE_\w+)=", example, re.MULTILINE))


@pytest.mark.parametrize("service", SERVICES)
def test_every_variable_is_a_setting_and_every_setting_is_given(service: str) -> None:
    setting_names = {f"MUXTUNE_{field.name.upper()}" for field in dataclasses.fields(SETTINGS[service])}
    images = [service, "execution-cuda"] if service == "execution" else [service]
    for target in images:
        environment = environment_of_image(target) | compose(FILLED)["services"][service]["environment"]
        ours = {name for name in environment if name.startswith("MUXTUNE_")}
        assert ours <= setting_names
        from_environment(SETTINGS[service], {name: str(value) for name, value in environment.items()})


@pytest.mark.parametrize("service", SERVICES)
def test_ports_agree(service: str) -> None:
    port = environment_of_image(service)["MUXTUNE_LISTEN"].rpartition(":")[2]
    exposed = [rest for word, rest in image_of(service) if word == "EXPOSE"]
    check = last_of(service, "HEALTHCHECK")
    assert exposed == ["9464", f"{port} {INTERNAL_PORT}" if service == "admission" else port]
    assert f'"127.0.0.1:{port}", "{service}"' in check
    assert json.loads(last_of(service, "CMD")) == ["python", "-m", f"services.{service}"]
    everywhere = yaml.safe_dump(compose(FILLED)["services"])
    called = {INTERNAL_PORT} if service == "admission" else {port}  # its other door is the clients'
    assert set(re.findall(rf"\b{service}:(\d+)", everywhere)) <= called


def test_no_container_mounts_the_key_of_another() -> None:
    services = compose(FILLED)["services"]
    held = {name: [v for v in service.get("volumes", []) if v.startswith(("ca:", "certs-"))]
            for name, service in services.items()}  # fmt: skip
    for name in (*SERVICES, "operator"):
        assert held.pop(name) == [f"certs-{name}:/var/lib/muxtune/certs:ro"]
    assert len(held.pop("certs")) == 6
    assert not any(held.values())
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert not any(INTERNAL_PORT in str(port) for port in published)


def test_images_run_as_an_unprivileged_user() -> None:
    for service in (*SERVICES, "execution-cuda"):
        assert last_of(service, "USER") == "10001:10001"
        assert last_of(service, "STOPSIGNAL") == "SIGTERM"


def test_every_target_of_compose_is_a_stage_and_every_copy_is_there() -> None:
    stages_by_name = stages()
    for name in ("compose.yaml", "compose.cuda.yaml"):
        for service in compose(FILLED, name)["services"].values():
            if build := service.get("build"):
                assert build["target"] in stages_by_name
                assert (DEPLOY / build["context"]).resolve() == ROOT
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for word, rest in (instruction for stage in stages_by_name.values() for instruction in stage.instructions):
        if word == "COPY" and "--from=" not in rest and rest.split()[0] != "constraints.txt":
            for path in rest.split()[:-1]:
                assert (ROOT / path).exists()
                assert f"!{path}" in ignored
        elif word == "COPY" and "--from=" in rest:
            assert rest.split()[0].removeprefix("--from=") in stages_by_name


def test_only_execution_has_torch() -> None:
    text = {name: str(stage.instructions) for name, stage in stages().items()}
    assert {name for name in text if "torch==" in text[name]} == {"build-execution", "build-execution-cuda"}
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert all(f"torch=={pinned[1]}" in text[name] for name in ("build-execution", "build-execution-cuda"))


def test_prometheus_asks_every_service() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    (targets,) = (config["targets"] for config in job["static_configs"])
    port = environment_of_image("admission")["MUXTUNE_PROMETHEUS_PORT"]
    assert sorted(targets) == sorted(f"{service}:{port}" for service in SERVICES)


def test_volumes_are_writable_for_the_images_user() -> None:
    commands = " ".join(rest for word, rest in image_of("admission") if word == "RUN")
    assert "install -d -o muxtune -g muxtune" in commands
    for service in (*SERVICES, "prepare", "certs", "operator"):
        for volume in compose(FILLED)["services"][service].get("volumes", []):
            name, path = volume.split(":")[:2]
            if name in compose(FILLED)["volumes"]:
                assert path in commands


def test_the_wheel_holds_everything_the_images_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("engine", "services", "muxtune"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in held
    assert "services/admission/migrations/env.py" in held


def test_filling_in() -> None:
    assert filled_in("${A:-x}=${B}${C:-}", {"B": "1"}) == "x=1"
