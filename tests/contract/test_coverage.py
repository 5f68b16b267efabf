"""Every RPC of every service is called by a test, and every error reason has a class on both sides."""

import re
from pathlib import Path

import pytest

from muxtune import errors
from muxtune.v1 import (
    admission_pb2,
    alignment_pb2,
    errors_pb2,
    execution_pb2,
    key_pb2,
    ledger_pb2,
    operator_pb2,
    scheduling_pb2,
)
from services.rpc.errors import TABLE

MODULES = (admission_pb2, alignment_pb2, execution_pb2, key_pb2, ledger_pb2, operator_pb2, scheduling_pb2)
RPCS = [
    (service.name, method.name)
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
TESTS = "\n".join(
    path.read_text() for path in Path(__file__).parents[1].rglob("*.py") if path.name != Path(__file__).name
)


@pytest.mark.parametrize(("service", "method"), RPCS, ids=lambda text: text)
def test_every_rpc_is_called_through_a_stub(service: str, method: str) -> None:
    assert re.search(rf"[\w)]\.{method}\(", TESTS), f"no test calls {service}.{method}"


def test_every_reason_has_an_error_on_both_sides() -> None:
    names = errors_pb2.ErrorReason.DESCRIPTOR.values_by_name
    reasons = {name.removeprefix("ERROR_REASON_") for name in names} - {"UNSPECIFIED"}
    assert reasons == {mapped.reason for mapped in TABLE.values()}
    assert reasons == set(errors.by_reason())
