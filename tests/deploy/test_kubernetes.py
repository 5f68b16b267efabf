"""deploy/kubernetes.yaml follows the API's schema, and agrees with the images and the services' settings."""

import dataclasses
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.settings import from_environment
from tests.deploy.compose_file import DEPLOY, SERVICES, environment_of_image
from tests.deploy.test_files import INTERNAL_PORT, SETTINGS

OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
SECRETS = {"MUXTUNE_DATABASE_URL": "postgresql+psycopg://u@h/d"}  # muxtune-database


def of_kind(*kinds: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in OBJECTS if o["kind"] in kinds}


WORKLOADS = of_kind("Deployment", "StatefulSet")


def pod(service: str) -> dict[str, Any]:
    spec: dict[str, Any] = WORKLOADS[service]["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("object_", OBJECTS, ids=lambda o: f"{o['kind']} {o['metadata']['name']}")
def test_each_object_is_of_the_apis_schema(object_: dict[str, Any]) -> None:
    kubernetes_validate.validate(object_, kubernetes_validate.latest_version(), strict=True)


def test_the_schema_is_alive() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": 1}}
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_is_given_and_every_port_agrees(service: str) -> None:
    (container,) = pod(service)["containers"]
    config = of_kind("ConfigMap")["muxtune"]["data"]
    variables = {entry["name"]: str(entry.get("value", "pod-0")) for entry in container.get("env", [])}
    environment = environment_of_image(service) | config | variables | (SECRETS if service == "admission" else {})
    settings = from_environment(SETTINGS[service], environment)
    setting_names = {f"MUXTUNE_{field.name.upper()}" for cls in SETTINGS.values() for field in dataclasses.fields(cls)}
    assert {name for name in (*config, *variables) if name.startswith("MUXTUNE_")} <= setting_names
    port = int(settings.listen.rpartition(":")[2])
    ports = {entry["containerPort"] for entry in container["ports"]} - {9464}
    assert ports == ({port, int(INTERNAL_PORT)} if service == "admission" else {port})
    assert {entry["port"] for entry in of_kind("Service")[service]["spec"]["ports"]} == ports
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        command = container[probe]["exec"]["command"]
        assert command == ["python", "-m", "services.rpc.health", f"127.0.0.1:{port}", service]


def test_each_address_is_a_services() -> None:
    services = of_kind("Service")
    for name, value in of_kind("ConfigMap")["muxtune"]["data"].items():
        if name.endswith("_ADDRESS"):
            host, _, port = value.rpartition(":")
            assert int(port) in {entry["port"] for entry in services[host]["spec"]["ports"]}, name


def test_two_admissions_are_replaced_one_after_the_other_and_scheduling_sees_both() -> None:
    """Admission has two replicas, because its state is in PostgreSQL (docs/adr/0011). All others have one."""
    spec = WORKLOADS["admission"]["spec"]
    assert spec["replicas"] == 2 and spec["minReadySeconds"] == 10
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    host, _, port = of_kind("ConfigMap")["muxtune"]["data"]["MUXTUNE_ADMISSION_ADDRESS"].rpartition(":")
    service = of_kind("Service")[host]["spec"]
    assert (service["clusterIP"], service["selector"], port) == ("None", {"app": "admission"}, INTERNAL_PORT)
    assert all(WORKLOADS[name]["spec"]["replicas"] == 1 for name in SERVICES if name != "admission")


def test_no_pod_mounts_the_key_of_another_and_none_runs_as_root() -> None:
    for service in SERVICES:
        spec = pod(service)
        held = [v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v]
        assert held == [f"{service}-certs"]
        mounted = {m["mountPath"]: m for m in spec["containers"][0]["volumeMounts"]}
        assert mounted[of_kind("ConfigMap")["muxtune"]["data"]["MUXTUNE_CERTS"]]["readOnly"]
        assert spec["securityContext"]["runAsUser"] == 10001 and spec["automountServiceAccountToken"] is False
        limits = spec["containers"][0]["securityContext"]
        assert limits["readOnlyRootFilesystem"] and limits["capabilities"] == {"drop": ["ALL"]}


def test_only_the_clients_port_is_open_from_outside() -> None:
    policies = of_kind("NetworkPolicy")
    assert policies["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    open_to_all = [
        (policy["spec"]["podSelector"], rule["ports"])
        for policy in policies.values()
        for rule in policy["spec"].get("ingress", [])
        if "from" not in rule
    ]
    assert open_to_all == [({"matchLabels": {"app": "admission"}}, [{"port": 7401}])]
    among = {entry["port"] for entry in policies["mesh"]["spec"]["ingress"][0]["ports"]}
    assert among == {7402, 7403, 7404, int(INTERNAL_PORT)}
