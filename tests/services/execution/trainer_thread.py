"""Runs a real trainer on a thread of the test's process, so that a test can patch its engine and its store.

The test acts as its server (at the other end of the pipe), as alignment (which packs real rounds) and as artifact
store.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from obstore.store import LocalStore

from engine.alignment.packing import rounds
from engine.errors import UnavailableError
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc, execution_pb2, plan_pb2
from services.conversion.microbatch import microbatch_to_proto
from services.execution.settings import ExecutionSettings
from services.execution.trainer import trainer as module
from services.execution.trainer_pipe import BlockingPipe, Tag
from services.storage.artifact_store import ArtifactStore
from tests.services.execution.executor_mesh import TIMEOUT_SECONDS, kind_of, packed_task

Results = list[plan_pb2.TaskResult]


class Gates:
    """A gate that, while closed for a name, blocks callers with that name, or refuses them if `is_away`.

    `reached`: a caller has come.
    """

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.reached = threading.Event()
        self._part, self._is_away = "", False

    def close(self, part: str, *, is_away: bool = False) -> None:
        self.reached.clear()
        self._part, self._is_away = part, is_away
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self, name: str) -> None:
        """Waits at a closed gate. Raises UnavailableError if it `is_away`."""
        if self._open.is_set() or self._part not in name:
            return
        self.reached.set()
        if self._is_away:
            raise UnavailableError("away, says a test")
        assert self._open.wait(TIMEOUT_SECONDS), "the test did not open the gate"


class GatedStore(ArtifactStore):
    def __init__(self, folder: Path) -> None:
        super().__init__(LocalStore(folder, mkdir=True), folder)
        self.gates = Gates()

    def stream(self, key: str, chunk_bytes: int) -> Iterator[bytes]:
        self.gates.pass_through(f"get {key}")
        return super().stream(key, chunk_bytes)

    def _put(self, key: str, data: Any, **options: Any) -> None:
        self.gates.pass_through(f"put {key}")
        super()._put(key, data, **options)


class GatedAlignment(alignment_pb2_grpc.AlignmentServiceServicer):
    def __init__(self) -> None:
        self.gates = Gates()
        self.members: list[set[str]] = []  # of each opened stream
        self.is_old = False  # as a version that does not know positions within a step

    def StreamMicrobatches(self, request: Any, context: Any) -> Iterator[Any]:
        named = " ".join(member.task for member in request.members)
        self.members.append({member.task.rpartition("/")[2] for member in request.members})
        if self.is_old:
            for member in request.members:
                member.ClearField("done")
        members = [packed_task(member) for member in request.members]
        for microbatch in rounds(members, request.token_budget, request.chunk_tokens):
            try:
                self.gates.pass_through(named)
            except UnavailableError as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
            yield alignment_pb2.StreamMicrobatchesResponse(microbatch=microbatch_to_proto(microbatch))


class TrainerThread:
    """Sends plans with `plan` and collects the results, for which `until` waits."""

    def __init__(self, pipe: BlockingPipe, store: GatedStore, alignment: GatedAlignment) -> None:
        self.store, self.alignment, self.results = store, alignment, Results()
        self._pipe, self._version, self.is_drained = pipe, 0, False
        self.exported: list[execution_pb2.ExportAdapterResponse] = []
        self.described = execution_pb2.DescribeExecutorResponse()  # as the trainer did last
        self.data_wait_fraction = 0.0
        self._news = threading.Condition()
        self.ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def plan(self, *tasks: plan_pb2.PlannedTask, htasks: list[list[str]], round_tokens: int = 0) -> None:
        """Sends a plan. `htasks`: short names of the tasks in each; `round_tokens`: of each task."""
        self._version += 1
        groups = [
            plan_pb2.HTask(tasks=map(full, g), token_budget=128, chunk_tokens=16, round_tokens=[round_tokens] * len(g))
            for g in htasks
        ]
        self.tell(Tag.PLAN, plan_pb2.ExecutorPlan(version=self._version, tasks=tasks, htasks=groups))

    def tell(self, tag: Tag, message: Any = None) -> None:
        self._pipe.write(tag, message)

    def of(self, task: str, kind: str) -> list[Any]:
        return [getattr(r, kind) for r in self.results if r.task == full(task) and kind_of(r) == kind]

    def steps(self, task: str) -> list[tuple[int, float]]:
        return [(done.step, done.loss) for done in self.of(task, "step_done")]

    def adapter(self, task: str) -> bytes:
        (finished,) = self.of(task, "finished")
        return self.store.read_folder(finished.adapter_key)[1]["adapter_model.safetensors"]

    def until(self, condition: Callable[[], object]) -> None:
        with self._news:
            if not self._news.wait_for(condition, TIMEOUT_SECONDS):
                pytest.fail(f"never happened; results: {[(r.task, kind_of(r)) for r in self.results]}")

    def until_ended(self, *tasks: str) -> None:
        ends = ("finished", "failed", "released")
        self.until(lambda: all(any(self.of(task, kind) for kind in ends) for task in tasks))

    def _read(self) -> None:
        while (frame := self._pipe.read()) is not None:
            tag, payload = frame
            with self._news:
                if tag is Tag.RESULTS:
                    response = execution_pb2.RunPlanResponse.FromString(payload)
                    self.results += response.results
                    self.data_wait_fraction = response.device.data_wait_fraction
                elif tag is Tag.DESCRIBED:
                    self.described = execution_pb2.DescribeExecutorResponse.FromString(payload)
                elif tag is Tag.EXPORTED:
                    self.exported.append(execution_pb2.ExportAdapterResponse.FromString(payload))
                self.is_drained |= tag is Tag.DRAINED
                self._news.notify_all()
            self.ready.set()


def full(task: str) -> str:
    return task if "/" in task else f"tenants/t/tasks/{task}"


@contextmanager
def running_trainer(folder: Path, backbone: Path, **overrides: Any) -> Iterator[TrainerThread]:
    """Runs a trainer and ends it by closing its pipe. Fails if the trainer raised an error."""
    store, alignment, died = GatedStore(folder / "store"), GatedAlignment(), list[BaseException]()
    server = grpc.server(ThreadPoolExecutor(16))
    alignment_pb2_grpc.add_AlignmentServiceServicer_to_server(alignment, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    settings = ExecutionSettings(
        **{
            "mesh_secret": "secret", "scheduling_address": "", "alignment_address": address, "artifact_url": "unused",
            "backbone": f"tiny={backbone}", "calibration_seconds": 0.05, "checkpoint_steps": 1000, **overrides,
        }
    )  # fmt: skip
    ours, theirs = socket.socketpair()

    def train() -> None:
        try:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(module.ArtifactStore, "open", lambda url: store)
                trainer = module.Trainer(settings, BlockingPipe(theirs.detach()))
            with suppress(BrokenPipeError, ConnectionResetError):  # its server is gone
                trainer.run()
        except BaseException as error:
            died.append(error)
            raise

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    running = TrainerThread(BlockingPipe(ours.detach()), store, alignment)
    try:
        assert running.ready.wait(TIMEOUT_SECONDS), died
        yield running
    finally:
        store.gates.open()
        alignment.gates.open()
        running._pipe._socket.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT_SECONDS)
        server.stop(None)
    assert not died and not thread.is_alive()
