"""Runs a real executor (server and trainer, two processes) between fakes of scheduling and alignment.

The fake alignment packs real rounds (engine.alignment.packing) of random tokens; the test acts as scheduling.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from engine.alignment.dataset import TokenizedDataset
from engine.alignment.packing import PackedTask, rounds
from engine.errors import InvalidInputError, LeaseLostError, UnavailableError
from muxtune.v1 import (
    alignment_pb2,
    alignment_pb2_grpc,
    execution_pb2,
    execution_pb2_grpc,
    plan_pb2,
    scheduling_pb2,
    scheduling_pb2_grpc,
    task_pb2,
)
from muxtune.v1.executor_history_pb2 import ExecutorHistory
from services.conversion.microbatch import microbatch_to_proto
from services.conversion.plan_parts import split_plan
from services.conversion.task import training_to_domain
from services.execution.settings import ExecutionSettings
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.interceptor import RpcInterceptor
from services.settings import environment_of

SECRET = "mesh_secret-of-the-tests"
TIMEOUT_SECONDS = 40.0
VOCAB = 64
BAD_VERSION = "bad"


def dataset_of(version: str) -> TokenizedDataset:
    """Returns twelve rows of different lengths, drawn with the dataset's version as seed; N rows for "rows-N"."""
    num_rows = int(version.removeprefix("rows-")) if version.startswith("rows-") else 12
    generator = np.random.default_rng(int.from_bytes(version.encode(), "little") % 2**32)
    lengths = generator.integers(4, 20, size=num_rows)
    total = int(lengths.sum())
    return TokenizedDataset(
        token_ids_S=generator.integers(0, VOCAB, total).astype(np.int32),
        bears_loss_S=np.ones(total, bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        lines=np.arange(1, num_rows + 1),
        original_lengths=lengths,
        refused=(),
        num_truncated=0,
    )


def packed_task(member: Any) -> PackedTask:
    """Returns a member of a stream with its data, at its position."""
    return PackedTask(
        member.task,
        dataset_of(member.dataset_version),
        training_to_domain(member.training),
        member.num_steps,
        member.cursor_step,
        round_tokens=member.round_tokens,
        is_evaluated=member.is_evaluated,
        done=tuple((interval.start, interval.end) for interval in member.done),
    )


class FakeAlignment(alignment_pb2_grpc.AlignmentServiceServicer):
    """Streams microbatches.

    `num_failures`: so many streams fail after one microbatch. `gate`: while closed, no microbatch is sent.
    """

    def __init__(self) -> None:
        self.num_failures = 0
        self.requests: list[alignment_pb2.StreamMicrobatchesRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.pause_seconds = 0.0

    async def StreamMicrobatches(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        for member in request.members:
            if member.dataset_version == BAD_VERSION:
                raise InvalidInputError.of_field("members.dataset_version", "of one member is invalid")
        members = [packed_task(member) for member in request.members]
        for microbatch in rounds(members, request.token_budget, request.chunk_tokens):
            await self.gate.wait()
            await asyncio.sleep(self.pause_seconds)
            yield alignment_pb2.StreamMicrobatchesResponse(microbatch=microbatch_to_proto(microbatch))
            if self.num_failures > 0:
                self.num_failures -= 1
                raise UnavailableError("going away for a moment")


class FakeScheduling(scheduling_pb2_grpc.SchedulingServiceServicer):
    """Grants leases; `lose` makes the next renewal fail."""

    def __init__(self) -> None:
        self.term = 0
        self.is_lost = False
        self.registered: asyncio.Queue[plan_pb2.Executor] = asyncio.Queue()
        self.histories: list[ExecutorHistory] = []
        self.ended: list[str] = []
        self.num_renewals, self.renewed = 0, asyncio.Event()
        self.lease_seconds = 3

    async def RegisterExecutor(self, request: Any, context: Any) -> scheduling_pb2.RegisterExecutorResponse:
        self.term, self.is_lost = self.term + 1, False
        answer = scheduling_pb2.RegisterExecutorResponse(lease_term=self.term)
        answer.lease_duration.FromSeconds(self.lease_seconds)
        request.executor.lease_term = self.term
        self.histories.append(request.history)
        self.registered.put_nowait(request.executor)
        return answer

    async def KeepLease(self, request: Any, context: Any) -> scheduling_pb2.KeepLeaseResponse:
        if self.is_lost or request.lease_term != self.term:
            raise LeaseLostError("the lease ended")
        self.num_renewals += 1
        self.renewed.set()
        self.renewed = asyncio.Event()
        return scheduling_pb2.KeepLeaseResponse()

    async def EndLease(self, request: Any, context: Any) -> scheduling_pb2.SchedulingServiceEndLeaseResponse:
        self.ended.append(request.incarnation)
        return scheduling_pb2.SchedulingServiceEndLeaseResponse()


def planned(
    task: str, *, attempt: int = 1, num_steps: int = 4, version: str = "", **fields: Any
) -> plan_pb2.PlannedTask:
    """Returns a small LoRA task of tenant t; `training` overrides its hyperparameters."""
    training = {"learning_rate": 0.01, "num_steps": num_steps, "global_batch_size": 4, "micro_batch_size": 2, "seed": 7}
    training |= fields.pop("training", {})
    spec = task_pb2.TaskSpec(
        backbone="tiny",
        lora=task_pb2.Lora(rank=4, target_modules=fields.pop("targets", ["q_proj", "down_proj"])),
        dataset="tenants/t/datasets/d",
        dataset_version=version or task,
        training=task_pb2.Training(**training),
    )
    name = f"tenants/t/tasks/{task}"
    return plan_pb2.PlannedTask(task=name, spec=spec, attempt=attempt, num_steps=num_steps, **fields)


def plan_of(version: int, *tasks: plan_pb2.PlannedTask, htasks: list[list[str]] | None = None) -> Any:
    groups = htasks if htasks is not None else [[task.task for task in tasks]]
    return plan_pb2.ExecutorPlan(
        version=version,
        executor="executors/local",
        tasks=tasks,
        htasks=[plan_pb2.HTask(tasks=g, token_budget=128, chunk_tokens=16) for g in groups if g],
    )


def kind_of(result: plan_pb2.TaskResult) -> str:
    return str(result.WhichOneof("result"))


class Stream:
    """Opens RunPlan as scheduling does: sends plans, collects results and, unless switched off, acknowledges them."""

    def __init__(self, channel: grpc.aio.Channel, lease_term: int, *, acknowledges: bool = True) -> None:
        self._lease_term, self._acknowledges = lease_term, acknowledges
        self._outgoing: asyncio.Queue[execution_pb2.RunPlanRequest | None] = asyncio.Queue()
        self.responses: list[execution_pb2.RunPlanResponse] = []
        self._news = asyncio.Condition()
        self.send()
        stub = execution_pb2_grpc.ExecutionServiceStub(channel)
        self.reading = asyncio.create_task(self._read(stub.RunPlan(self._requests())))

    @property
    def results(self) -> list[plan_pb2.TaskResult]:
        return [result for response in self.responses for result in response.results]

    def of(self, task: str, kind: str) -> list[Any]:
        name = f"tenants/t/tasks/{task}"
        return [getattr(r, kind) for r in self.results if r.task == name and kind_of(r) == kind]

    def send(
        self, plan: plan_pb2.ExecutorPlan | None = None, acknowledged: int = 0, stale: tuple[str, ...] = ()
    ) -> None:
        """Sends a plan as scheduling does, in parts if it is large."""
        *parts, last = split_plan(plan) if plan is not None else [None]
        for part in parts:
            self._outgoing.put_nowait(execution_pb2.RunPlanRequest(plan=part, plan_continues=True))
        self._outgoing.put_nowait(
            execution_pb2.RunPlanRequest(
                lease_term=self._lease_term, plan=last, acknowledged_sequence=acknowledged, stale_tasks=stale
            )
        )

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds for the results. Fails with the results if it never does."""
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS), self._news:
                await self._news.wait_for(lambda: condition() or self.reading.done())
        except TimeoutError:
            pytest.fail(f"never happened; results so far: {[(r.task, kind_of(r)) for r in self.results]}")
        if not condition():
            self.reading.result()
            pytest.fail(f"the stream ended first; results: {[(r.task, kind_of(r)) for r in self.results]}")

    async def until_finished(self, *tasks: str) -> None:
        await self.until(lambda: all(self.of(task, "finished") or self.of(task, "failed") for task in tasks))
        for task in tasks:
            assert not self.of(task, "failed"), self.of(task, "failed")

    async def close(self) -> None:
        """Cancels the stream, like a scheduling service that is killed."""
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)

    async def _requests(self) -> AsyncIterator[execution_pb2.RunPlanRequest]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _read(self, call: Any) -> None:
        try:
            async for response in call:
                self.responses.append(response)
                if self._acknowledges:
                    self.send(acknowledged=response.sequence)
                async with self._news:
                    self._news.notify_all()
        finally:
            async with self._news:
                self._news.notify_all()


@dataclass
class Mesh:
    """Holds the executor's process and the fakes around it."""

    settings: ExecutionSettings
    alignment: FakeAlignment
    scheduling: FakeScheduling
    process: asyncio.subprocess.Process
    log: Path
    address: str = ""
    channel: Any = None
    streams: list[Stream] = field(default_factory=list)

    async def open_stream(self, lease_term: int = 0, *, acknowledges: bool = True) -> Stream:
        stream = Stream(self.channel, lease_term or self.scheduling.term, acknowledges=acknowledges)
        self.streams.append(stream)
        return stream

    @property
    def stub(self) -> Any:
        return execution_pb2_grpc.ExecutionServiceStub(self.channel)

    @property
    def artifacts(self) -> Path:
        return Path(self.settings.artifact_url)

    def trainer_pid(self) -> int:
        """Returns the process id of the trainer."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return next(int(pid) for pid, command in commands.items() if b"services.execution.trainer\0" in command)

    async def stop(self) -> int:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await self.process.wait()


async def _registered(process: asyncio.subprocess.Process, scheduling: FakeScheduling, log: Path) -> str:
    """Returns the executor's address once it has registered. Fails with its log if it ends or takes too long."""
    registered, ended = asyncio.create_task(scheduling.registered.get()), asyncio.create_task(process.wait())
    await asyncio.wait({registered, ended}, timeout=TIMEOUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    ended.cancel()
    if not registered.done():
        registered.cancel()
        pytest.fail(f"the executor did not register; its log: {_tail(log)}")
    return registered.result().address


@contextlib.asynccontextmanager
async def running_mesh(folder: Path, backbone: Path, **overrides: Any) -> AsyncIterator[Mesh]:
    """Starts an executor and its fakes, waits until it has registered, and ends them all."""
    alignment, scheduling = FakeAlignment(), FakeScheduling()
    server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(SECRET))])
    alignment_pb2_grpc.add_AlignmentServiceServicer_to_server(alignment, server)
    scheduling_pb2_grpc.add_SchedulingServiceServicer_to_server(scheduling, server)
    fakes = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    settings = ExecutionSettings(
        **{
            "mesh_secret": SECRET,
            "ready_file": folder / "ready.json",
            "trace_file": folder / "trace.jsonl",
            "scheduling_address": fakes,
            "alignment_address": fakes,
            "artifact_url": str(folder / "artifacts"),
            "backbone": f"tiny={backbone}",
            "num_threads": 1,
            "checkpoint_steps": 2,
            "calibration_seconds": 0.1,
            **overrides,
        }
    )
    log = folder / "log.jsonl"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.execution",
            env={**os.environ, **environment_of(settings), "OMP_NUM_THREADS": "1"}, stderr=output,
        )  # fmt: skip
    mesh = Mesh(settings, alignment, scheduling, process, log)
    try:
        mesh.address = await _registered(process, scheduling, log)
        mesh.channel = open_channel(mesh.address, SECRET)
        yield mesh
    finally:
        for stream in mesh.streams:
            await stream.close()
        await mesh.stop()
        if mesh.channel is not None:
            await mesh.channel.close()
        await server.stop(None)


def log_lines(mesh: Mesh) -> list[dict[str, Any]]:
    return [json.loads(line) for line in mesh.log.read_text().splitlines() if line.startswith("{")]


def _tail(log: Path) -> str:
    return log.read_text()[-3000:]
