"""The table of errors is complete, and both ends of a call see the same error."""

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import muxtune.errors
from engine import errors
from engine.errors import FieldViolation, InvalidInputError, MuxtuneError
from muxtune.v1 import admission_pb2, admission_pb2_grpc, errors_pb2
from services.rpc.authentication import bearer_metadata
from services.rpc.errors import TABLE, mapped, to_failure, to_status
from services.telemetry import _JsonFormatter

ROOT = Path(__file__).parents[3]
GET = admission_pb2.GetTaskRequest(name="tenants/a/tasks/b")


def all_errors(cls: type[MuxtuneError] = MuxtuneError) -> list[type[MuxtuneError]]:
    return [cls, *(deeper for sub in cls.__subclasses__() for deeper in all_errors(sub))]


def public_errors(cls=muxtune.errors.MuxtuneError) -> list[type]:
    return [cls, *(deeper for sub in cls.__subclasses__() for deeper in public_errors(sub))]


def proto_reasons() -> set[str]:
    names = errors_pb2.ErrorReason.keys()
    return {name.removeprefix("ERROR_REASON_") for name in names} - {"UNSPECIFIED"}


def raising(error: Exception):
    async def method(request, context):
        raise error

    return method


def test_every_domain_error_has_a_row_of_its_own() -> None:
    ours = {cls for cls in all_errors() if cls.__module__ == errors.__name__}
    assert ours == set(TABLE)
    assert {row.reason for row in TABLE.values()} == proto_reasons()
    assert len({row.reason for row in TABLE.values()}) == len(TABLE)


def test_users_find_every_reason_under_the_same_class_name() -> None:
    by_reason = {cls.reason: cls.__name__ for cls in public_errors() if cls.reason}
    assert set(by_reason) == proto_reasons()
    for cls, row in TABLE.items():
        if cls is not MuxtuneError:
            assert by_reason[row.reason] == cls.__name__


def test_a_subclass_has_the_row_of_its_base() -> None:
    class Special(errors.LeaseLostError):
        pass

    assert mapped(Special("x")).reason == "LEASE_LOST"


@pytest.mark.parametrize("cls", all_errors()[:22], ids=lambda cls: cls.__name__)
async def test_both_ends_see_the_same_error(start_mesh, cls: type[MuxtuneError]) -> None:
    error = cls("naïve text", task="tenants/a/tasks/b", line=7)
    if isinstance(error, InvalidInputError):
        error.violations = (FieldViolation("spec.training.learning_rate", "must be positive"),)
    mesh = await start_mesh(GetTask=raising(error))
    if TABLE[cls].code is grpc.StatusCode.UNAVAILABLE:
        return  # retried away: see test_mesh.py
    with pytest.raises(cls) as inside:
        await (await mesh.admission()).GetTask(GET)
    assert type(inside.value) is cls
    assert inside.value.message == error.message and inside.value.metadata == error.metadata
    assert getattr(inside.value, "violations", ()) == getattr(error, "violations", ())
    async with grpc.aio.insecure_channel(mesh.address) as plain:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admission_pb2_grpc.AdmissionServiceStub(plain).GetTask(GET, metadata=[bearer_metadata(mesh.secret)])
    assert caught.value.code() is TABLE[cls].code
    public = muxtune.errors.from_rpc_error(caught.value)
    assert public.reason == TABLE[cls].reason and public.metadata == error.metadata
    assert [(v.field, v.description) for v in public.violations] == [
        (v.field, v.description) for v in getattr(error, "violations", ())
    ]


def details_of(error: MuxtuneError) -> dict[type, object]:
    details = {}
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.QuotaFailure,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.RetryInfo,
    ):
        for packed in to_status(error).details:
            detail = kind()
            if packed.Unpack(detail):
                details[kind] = detail
    return details


def test_details_accompany_the_error_info() -> None:
    quota = details_of(errors.QuotaExceededError("too many", subject="tenants/a"))
    assert quota[error_details_pb2.QuotaFailure].violations[0].subject == "tenants/a"
    state = details_of(errors.IllegalTransitionError("no", task="tenants/a/tasks/b", state="SUCCEEDED"))
    violation = state[error_details_pb2.PreconditionFailure].violations[0]
    assert (violation.type, violation.subject) == ("SUCCEEDED", "tenants/a/tasks/b")
    assert details_of(errors.OverloadedError("later"))[error_details_pb2.RetryInfo].retry_delay.seconds > 0
    assert list(details_of(errors.NotFoundError("x"))) == [error_details_pb2.ErrorInfo]
    assert details_of(errors.NotFoundError("x"))[error_details_pb2.ErrorInfo].domain == "muxtune"


async def test_an_unexpected_error_shows_only_its_trace_id(start_mesh, spans, caplog) -> None:
    row = "the tenant's secret row"
    mesh = await start_mesh(GetTask=raising(KeyError(row)))
    with caplog.at_level(logging.ERROR), pytest.raises(MuxtuneError) as caught:
        await (await mesh.admission()).GetTask(GET)
    assert type(caught.value) is MuxtuneError
    trace_id = caught.value.metadata["trace_id"]
    [record] = [r for r in caplog.records if r.name == "services.rpc.errors"]
    assert "KeyError" in record.getMessage() and "in method" in record.getMessage()
    line = json.loads(_JsonFormatter("x").format(record))
    assert row not in f"{caught.value} {caught.value.metadata} {line}"
    assert int(trace_id, 16) != 0


async def test_many_and_long_violations_still_arrive(start_mesh) -> None:
    """gRPC accepts at most 8 KiB of trailing metadata: an unshortened error would not arrive at all."""
    violations = [FieldViolation(f"spec.labels[{i}]", "ü" * 500) for i in range(200)]
    mesh = await start_mesh(GetTask=raising(InvalidInputError("long: " + "ü" * 9000, violations, where="ü" * 9000)))
    with pytest.raises(InvalidInputError) as caught:
        await (await mesh.admission()).GetTask(GET)
    assert caught.value.violations[0].field == "spec.labels[0]"
    assert caught.value.violations[-1].description.endswith(" more")
    assert caught.value.message.endswith("...")


async def test_a_foreign_error_is_mapped_by_its_code(start_mesh) -> None:
    async def abort(request, context):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a proxy says no")

    mesh = await start_mesh(GetTask=abort)
    with pytest.raises(errors.UnauthenticatedError, match="a proxy says no"):
        await (await mesh.admission()).GetTask(GET)
    with pytest.raises(MuxtuneError, match="UNIMPLEMENTED"):
        await (await mesh.admission()).CancelTask(admission_pb2.CancelTaskRequest())


async def test_garbage_details_do_not_hide_the_status(start_mesh) -> None:
    async def abort(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

    async def lie(request, context):
        other = status_pb2.Status(code=3, message="another").SerializeToString()
        context.set_trailing_metadata((("grpc-status-details-bin", other),))
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

    for method in (abort, lie):
        mesh = await start_mesh(GetTask=method)
        with pytest.raises(errors.UnauthenticatedError):
            await (await mesh.admission()).GetTask(GET)


async def test_a_peers_error_passes_through_a_servicer(start_mesh) -> None:
    """An error that a servicer got from its own peer reaches the caller unchanged, also through a plain stub."""
    inner = await start_mesh(GetTask=raising(errors.WillNeverFitError("never", added_bytes=5)))

    async def forward(request, context):
        async with grpc.aio.insecure_channel(inner.address) as plain:
            stub = admission_pb2_grpc.AdmissionServiceStub(plain)
            return await stub.GetTask(request, metadata=[bearer_metadata(inner.secret)])

    outer = await start_mesh(GetTask=forward)
    with pytest.raises(errors.WillNeverFitError) as caught:
        await (await outer.admission()).GetTask(GET)
    assert caught.value.metadata == {"added_bytes": "5"}


async def test_cancellation_is_not_an_error(start_mesh) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def wait(request, context):
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set()
            raise

    mesh = await start_mesh(GetTask=wait)
    call = asyncio.ensure_future((await mesh.admission()).GetTask(GET))
    await began.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(ended.wait(), 10)


def test_a_failure_of_a_task_carries_the_reason() -> None:
    failure = to_failure(errors.NonFiniteError("loss is NaN at step 3", step=3))
    assert failure.reason == errors_pb2.ERROR_REASON_NON_FINITE
    assert failure.message == "loss is NaN at step 3" and dict(failure.metadata) == {"step": "3"}


def test_users_errors_need_no_server_code() -> None:
    program = "import sys, muxtune.errors; print({n.partition('.')[0] for n in sys.modules} & {'engine', 'services'})"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
