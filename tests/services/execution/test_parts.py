"""Tests the executor's parts alone: pipe, outbox, attempts, watchdog, early stop, checkpoint store."""

import asyncio
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.alignment.microbatch import Microbatch, MicrobatchKind
from engine.errors import ArtifactCorruptError
from engine.runtime.checkpoint import CheckpointState
from engine.task import Training
from muxtune.v1 import event_pb2, execution_pb2, plan_pb2
from services.execution.server.attempt_tracker import AttemptTracker
from services.execution.server.outbox import Outbox
from services.execution.server.watchdog import Watchdog
from services.execution.trainer.checkpoint_store import CheckpointStore
from services.execution.trainer.early_stop import EarlyStop
from services.execution.trainer.step_spans import StepWindow
from services.execution.trainer_pipe import MAX_FRAME_BYTES, AsyncPipe, BlockingPipe, Tag
from services.storage.artifact_store import ArtifactStore
from services.storage.scratch_folder import ScratchFolder

TASK = "tenants/t/tasks/a"


async def test_frames_cross_the_pipe_whole_both_ways() -> None:
    ours, theirs = socket.socketpair()
    pipe, trainer = await AsyncPipe.of(ours), BlockingPipe(theirs.detach())
    large = plan_pb2.ExecutorPlan(version=7, trace_parent="x" * 3_000_000)  # far over the socket's buffer
    echo = threading.Thread(target=lambda: _echo(trainer))
    echo.start()
    await pipe.write(Tag.DRAIN)
    assert await pipe.read() == (Tag.DRAIN, b"")
    writing = asyncio.create_task(pipe.write(Tag.PLAN, large))
    assert await pipe.read() == (Tag.PLAN, large.SerializeToString())
    await writing
    pipe.close()
    await asyncio.to_thread(echo.join)


def _echo(trainer: BlockingPipe) -> None:
    while (frame := trainer.read()) is not None:
        tag, payload = frame
        trainer.write(tag, plan_pb2.ExecutorPlan.FromString(payload) if payload else None)


@pytest.mark.parametrize(
    "torn",
    [b"", b"P", b"P\x05\x00\x00\x00abc", b"?\x00\x00\x00\x00", b"P" + (MAX_FRAME_BYTES + 1).to_bytes(4, "little")],
)
async def test_a_pipe_that_ends_or_holds_no_valid_frame_reads_as_its_end(torn: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(torn)
    theirs.close()
    assert await (await AsyncPipe.of(ours)).read() is None
    ours, theirs = socket.socketpair()
    ours.sendall(torn)
    ours.close()
    assert BlockingPipe(theirs.detach()).read() is None


async def test_the_outbox_sends_again_what_was_not_acknowledged() -> None:
    outbox = Outbox(limit=3)
    for _ in range(3):
        await outbox.put(execution_pb2.RunPlanResponse())
    assert outbox.is_full
    first = outbox.read()
    assert [(await anext(first)).sequence for _ in range(3)] == [1, 2, 3]
    await outbox.acknowledge(2)
    assert not outbox.is_full
    second = outbox.read()
    assert (await anext(second)).sequence == 3
    waiting = asyncio.ensure_future(anext(second))
    await outbox.put(execution_pb2.RunPlanResponse())
    assert (await waiting).sequence == 4
    await outbox.close()
    await outbox.acknowledge(4)
    assert await anext(second, None) is None
    await outbox.wait_empty()


def plan(**attempts: int) -> plan_pb2.ExecutorPlan:
    return plan_pb2.ExecutorPlan(
        version=1, tasks=[plan_pb2.PlannedTask(task=name, attempt=attempt) for name, attempt in attempts.items()]
    )


def result(task: str, attempt: int, kind: str) -> plan_pb2.TaskResult:
    message = plan_pb2.TaskResult(task=task, attempt=attempt)
    getattr(message, kind).SetInParent()
    return message


def test_running_attempts_are_released_when_the_trainer_dies() -> None:
    attempts = AttemptTracker()
    attempts.start(plan(a=1, b=1, c=2, d=1))
    attempts.record_results([result("a", 1, "finished"), result("b", 1, "step_done")])
    assert attempts.drop_stale(["d"], []) == ["d"]
    assert {(r.task, r.attempt, r.WhichOneof("result")) for r in attempts.release_all("died")} == {
        ("b", 1, "released"),
        ("c", 2, "released"),
    }
    assert attempts.release_all("died") == []
    assert [task.task for task in attempts.start(plan(a=1, b=2, c=2)).tasks] == ["b"]


def test_results_of_attempts_that_were_dropped_do_not_count() -> None:
    attempts = AttemptTracker()
    attempts.start(plan(a=1, b=1))
    attempts.drop_all()
    attempts.start(plan(a=2))
    sent = [result("a", 1, "step_done"), result("b", 1, "finished"), result("a", 2, "step_done")]
    assert attempts.record_results(sent) == [sent[2]]


def test_attempts_that_lost_the_lease_are_suspects_until_they_left_the_device() -> None:
    attempts = AttemptTracker()
    attempts.start(plan(a=1, b=1, c=1))
    attempts.record_resident(["a", "b"])  # c is not attached yet
    attempts.drop_all()
    assert {(r.task, r.attempt, r.released.num_suspects) for r in attempts.release_all("x")} == {
        ("a", 1, 2),
        ("b", 1, 2),
    }
    attempts.start(plan(a=2, b=2))
    attempts.record_resident(["a", "b"])
    attempts.drop_all()
    attempts.record_resident(["b"])
    attempts.record_resident([])
    assert attempts.release_all("x") == []


async def test_a_lost_lease_returns_the_results_that_were_not_acknowledged() -> None:
    outbox = Outbox(limit=8)
    for task in "abc":
        await outbox.put(execution_pb2.RunPlanResponse(results=[result(task, 1, "released")]))
    await outbox.acknowledge(1)
    assert [r.task for r in await outbox.clear()] == ["b", "c"]
    assert await outbox.clear() == []


def test_a_stale_result_of_an_earlier_attempt_does_not_end_this_one() -> None:
    attempts = AttemptTracker()
    attempts.start(plan(a=2, b=2))
    judged = [result("a", 1, "released"), result("b", 2, "step_done")]
    assert attempts.drop_stale(["a", "b", "unknown"], judged) == ["b", "unknown"]
    assert [r.task for r in attempts.release_all("died")] == ["a"]


def test_tasks_that_left_the_device_are_not_suspects() -> None:
    attempts = AttemptTracker()
    attempts.start(plan(a=1, b=1, c=1))
    attempts.record_resident(["a", "b"])  # c is not attached yet
    attempts.record_resident(["b"])  # a only uploads its checkpoint
    attempts.start(plan(b=1, d=1))
    attempts.record_resident(["b", "d"])
    assert {r.task: r.released.num_suspects for r in attempts.release_all("x")} == {"a": 0, "b": 3, "c": 3, "d": 3}
    attempts.start(plan(a=2))
    assert [r.released.num_suspects for r in attempts.release_all("x")] == [1]


def test_released_results_count_the_suspects() -> None:
    attempts = AttemptTracker()
    attempts.start(plan(a=1, b=1, done=1))
    attempts.record_results([result("done", 1, "finished")])
    assert [(r.released.num_suspects, r.released.reason) for r in attempts.release_all("died")] == [(2, "died")] * 2


def test_the_watchdog_detects_a_silent_trainer_that_has_work() -> None:
    watchdog = Watchdog(8.0)
    watchdog.record_request(0.0)
    assert not any(watchdog.is_hung(float(now)) for now in range(0, 900, 2))  # it loads, whatever requests it gets
    watchdog.record_message(900.0)
    assert [watchdog.is_hung(float(now)) for now in range(900, 912, 2)][-1]
    watchdog.record_start()
    assert watchdog.interval_seconds == 2.0
    watchdog.record_message(0.0, is_idle=True)
    silent = [watchdog.is_hung(float(now)) for now in range(0, 40, 2)]
    assert not any(silent)  # it has nothing to do
    watchdog.record_request(40.0)
    assert [watchdog.is_hung(float(now)) for now in range(40, 52, 2)] == [False] * 5 + [True]
    watchdog.record_message(52.0)
    watchdog.record_request(57.0)  # a request while it works is not a message from it
    assert [watchdog.is_hung(float(now)) for now in range(54, 64, 2)] == [False] * 4 + [True]
    watchdog.record_message(64.0)
    assert not watchdog.is_hung(4000.0)  # this process was stopped too: the trainer's messages are not read yet
    watchdog.record_message(4000.0, is_idle=True)
    assert not any(watchdog.is_hung(float(now)) for now in range(4002, 4100, 2))


def training(patience: int, min_delta: float = 0.0) -> Training:
    return Training(learning_rate=1.0, num_steps=9, early_stop_patience=patience, early_stop_min_delta=min_delta)


def stops_at(losses: list[float], rule: Training) -> int | None:
    state = EarlyStop()
    for step, loss in enumerate(losses):
        state = EarlyStop(**vars(state.after(rule, step, loss).after(rule, step, loss)))  # resumed: counted twice
        if state.should_stop(rule):
            return step
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "expected"),
    [
        ([3, 2, 1, 0.5], 1, 0.0, None),
        ([3, 2, 2, 2], 2, 0.0, 3),
        ([3, 4, 2.5, 2.6, 2.7], 2, 0.0, 4),
        ([3, 2.95, 2.9], 2, 0.2, 2),
        ([float("nan"), 2, 1], 2, 0.0, None),
        ([float("nan"), float("nan")], 2, 0.0, 1),
        ([3, 3, 3, 3], 0, 0.0, None),
    ],
)
def test_early_stop(losses: list[float], patience: int, min_delta: float, expected: int | None) -> None:
    assert stops_at(losses, training(patience, min_delta)) == expected


@given(st.lists(st.floats(0, 10), max_size=20), st.integers(1, 4))
def test_early_stop_is_the_first_run_of_patience_evaluations_over_the_best_before(losses, patience) -> None:  # type: ignore[no-untyped-def]
    def stale(end: int) -> bool:
        start = end - patience + 1
        return start >= 1 and min(losses[start : end + 1]) >= min(losses[:start])

    expected = next((end for end in range(len(losses)) if stale(end)), None)
    assert stops_at(losses, training(patience)) == expected


def test_the_fraction_of_time_that_an_executor_waits_for_data() -> None:
    window = StepWindow()
    microbatch = Microbatch(0, MicrobatchKind.TRAIN, np.zeros(4, np.int32), np.zeros(4, np.int32), (), True)
    for _ in range(2000):
        window.add_wait(0.25)
        window.add(microbatch, 0.75, 1, [])
    assert window.wait_fraction == pytest.approx(0.25, rel=0.01)
    for _ in range(2000):
        window.add(microbatch, 0.75, 1, [])
    assert window.wait_fraction == pytest.approx(0.0, abs=1e-6)


def state(step: int) -> CheckpointState:
    return CheckpointState({"parameters.x": torch.full((3,), float(step))}, {"task": TASK, "step": step})


def folders(store: ArtifactStore) -> list[str]:
    keys = store.list(f"{TASK}/checkpoints")
    return [key.split("/")[-2] for key in keys if key.endswith("manifest.json")]


def test_the_trainer_deletes_no_checkpoints(tmp_path: Path) -> None:
    """Any of them may be the recorded one: an executor far ahead of its results once deleted it."""
    store = ArtifactStore.open(str(tmp_path))
    checkpoints = CheckpointStore(store, ScratchFolder.open(tmp_path / "scratch", "trainer"))
    recorded, *_ = [checkpoints.put_checkpoint(TASK, 1, state(step), {}) for step in (10, 20, 30)]
    checkpoints.put_checkpoint(TASK, 2, state(15), {})
    assert folders(store) == ["00000010-1", "00000015-2", "00000020-1", "00000030-1"]
    assert checkpoints.get_checkpoint(TASK, recorded)[0].step == 10


def test_a_corrupt_checkpoint_falls_back_to_one_before_it_never_after(tmp_path: Path) -> None:
    store = ArtifactStore.open(str(tmp_path))
    checkpoints = CheckpointStore(store, ScratchFolder.open(tmp_path / "scratch", "trainer"))
    checkpoints.put_checkpoint(TASK, 1, state(10), {"early_stop": {"best": 1.0}})
    recorded = checkpoints.put_checkpoint(TASK, 1, state(20), {})
    (file,) = (tmp_path / f"{TASK}/checkpoints/00000020-1").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    read, used = checkpoints.get_checkpoint(TASK, recorded)
    assert (read.step, read.metadata["early_stop"]) == (10, {"best": 1.0})
    assert (used.step, used.manifest_key) == (10, f"{TASK}/checkpoints/00000010-1/manifest.json")
    first = event_pb2.CheckpointCommitted(step=5, manifest_key=f"{TASK}/checkpoints/00000005-1/manifest.json")
    with pytest.raises(ArtifactCorruptError):
        checkpoints.get_checkpoint(TASK, first)
