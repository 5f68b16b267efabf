"""One table decides which roles may call which RPC; an RPC that is not in it is refused."""

import importlib
import pkgutil
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import muxtune.v1
from engine.errors import PermissionDeniedError
from services.rpc.authorization import TABLE, Role, check_access, rule_for

CLIENTS = {Role.TENANT, Role.VIEWER}
READING = ("Get", "List", "Watch", "Estimate", "Preflight", "Download")


def methods() -> Iterator[MethodDescriptor]:
    """Return every RPC of every proto, with health and reflection."""
    modules = [health_pb2, reflection_pb2]
    for module_info in pkgutil.iter_modules(muxtune.v1.__path__, "muxtune.v1."):
        if module_info.name.endswith("_pb2"):
            modules.append(importlib.import_module(module_info.name))
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from service.methods


NAMES = sorted(f"/{method.containing_service.full_name}/{method.name}" for method in methods())


def test_every_rpc_is_in_the_table_and_nothing_else() -> None:
    assert len(NAMES) > 30
    assert sorted(TABLE) == NAMES


@pytest.mark.parametrize("method", NAMES)
def test_the_kinds_of_callers_do_not_mix(method: str) -> None:
    """Only clients call AdmissionService, and nothing else; only health and reflection are public."""
    roles, service = rule_for(method).roles, method.split("/")[1]
    assert roles
    assert bool(roles & CLIENTS) == (service == "muxtune.v1.AdmissionService")
    assert (Role.ANYONE in roles) == service.startswith("grpc.")
    if service == "muxtune.v1.AdmissionService":
        assert roles <= CLIENTS
        assert (Role.VIEWER in roles) == method.split("/")[2].startswith(READING)
        assert rule_for(method).is_audited != (Role.VIEWER in roles)


@pytest.mark.parametrize("role", list(Role))
def test_a_method_outside_the_table_is_refused(role: Role) -> None:
    for method in ("/muxtune.v1.AdmissionService/Nonsense", "", "GetTask", "/muxtune.v1.AdmissionService/gettask"):
        with pytest.raises(PermissionDeniedError):
            check_access(method, role)


def test_a_role_may_call_what_the_table_allows_and_no_more() -> None:
    for method in NAMES:
        for role in set(Role) - {Role.MESH, Role.ANYONE}:
            if role in rule_for(method).roles:
                check_access(method, role)
            else:
                with pytest.raises(PermissionDeniedError, match=role.value):
                    check_access(method, role)
