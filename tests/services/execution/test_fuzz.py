"""Hypothesis sends nonsense to an executor's RPCs: each call gets a proper error, and the trainer survives."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from muxtune.v1 import execution_pb2, execution_pb2_grpc
from tests.hostile_messages import FAIR, FUZZING, PATIENT, answer_of, messages
from tests.services.execution.executor_mesh import SECRET, Mesh, running_mesh

pytestmark = [PATIENT, pytest.mark.asyncio(loop_scope="module")]

METHODS = [
    m
    for m in execution_pb2.DESCRIPTOR.services_by_name["ExecutionService"].methods
    if m.name not in ("Drain", "RunPlan")
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh"), tiny_backbone, calibration_seconds=0.0) as running:
        yield running


async def test_invalid_requests_get_proper_errors(mesh: Mesh) -> None:
    trainer = mesh.trainer_pid()
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        for method in METHODS:
            for sent in drawn(messages(method.input_type, ["tenants/a/tasks/t"]), FUZZING.max_examples):
                code, text, _ = await answer_of(channel, method, sent, SECRET)
                assert code in FAIR, (code, text, sent)
    assert mesh.trainer_pid() == trainer


async def test_invalid_plans_under_a_valid_lease_do_not_kill_the_trainer(mesh: Mesh) -> None:
    trainer, kind = mesh.trainer_pid(), execution_pb2.RunPlanRequest.DESCRIPTOR
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        stub = execution_pb2_grpc.ExecutionServiceStub(channel)
        for sent in drawn(messages(kind, ["tenants/a/tasks/t", "tiny"]), FUZZING.max_examples):
            sent.lease_term = mesh.scheduling.term
            call = stub.RunPlan(iter([sent]), metadata=[("authorization", f"Bearer {SECRET}")], timeout=20)
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                assert error.code() in FAIR, (error, sent)
            call.cancel()
    assert mesh.trainer_pid() == trainer


def drawn(strategy: st.SearchStrategy, count: int) -> list:
    """Returns examples for use in a running event loop."""
    collected: list = []

    @FUZZING
    @given(strategy)
    def collect(example: object) -> None:
        collected.append(example)

    collect()
    return collected[:count]
