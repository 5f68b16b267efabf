"""Tasks on a real executor are planned, trained, finished, resumed, cancelled and replanned, and fail alone."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.errors import LeaseLostError, NotFoundError, SupersededError
from muxtune.v1 import errors_pb2, execution_pb2
from services.storage.artifact_store import ArtifactStore
from tests.services.execution.executor_mesh import BAD_VERSION, Mesh, kind_of, plan_of, planned, running_mesh

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh"), tiny_backbone, max_unacknowledged=8) as running:
        yield running


class Versions:
    """Counts plan versions, which only grow on the executor that the module's tests share."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions()


def load_adapter(mesh: Mesh, key: str, backbone: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, files = ArtifactStore.open(mesh.settings.artifact_url).read_folder(key)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), folder)


def weights(mesh: Mesh, key: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    return load(ArtifactStore.open(mesh.settings.artifact_url).read_folder(key)[1]["adapter_model.safetensors"])


async def test_two_tasks_train_together_and_leave_adapters_that_peft_loads(
    mesh: Mesh, versions: Versions, tiny_backbone: Path
) -> None:
    stream = await mesh.open_stream()
    evaluated = {"heldout_fraction": 0.2, "evaluate_every_steps": 2}
    stream.send(plan_of(versions.next(), planned("a"), planned("b", num_steps=3, training=evaluated)))
    await stream.until_finished("a", "b")
    assert [done.step for done in stream.of("a", "step_done")] == [1, 2, 3, 4]
    assert [done.step for done in stream.of("b", "step_done")] == [1, 2, 3]
    assert [done.step for done in stream.of("b", "evaluated")] == [0, 2, 3]
    assert stream.of("a", "step_done")[0].num_neighbours == 1
    assert stream.responses[0].adopted
    assert [response.sequence for response in stream.responses] == list(range(1, len(stream.responses) + 1))
    (finished,) = stream.of("a", "finished")
    assert (finished.step, finished.cancelled) == (4, False)
    assert 0 <= finished.max_logit_difference < 1e-4
    model = load_adapter(mesh, finished.adapter_key, tiny_backbone)
    assert model.active_adapter == "default"
    assert any(
        np.abs(tensor).max() > 0 for name, tensor in weights(mesh, finished.adapter_key).items() if "lora_B" in name
    )
    await stream.close()


async def test_a_task_resumed_from_its_checkpoint_ends_with_the_same_weights(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream()
    stream.send(plan_of(versions.next(), planned("whole", num_steps=6, version="same")))
    await stream.until_finished("whole")
    (whole,) = stream.of("whole", "finished")
    mesh.alignment.pause_seconds = 0.05
    stream.send(plan_of(versions.next(), planned("parts", num_steps=6, version="same")))
    await stream.until(lambda: stream.of("parts", "checkpoint_committed"))
    stream.send(plan_of(versions.next()))  # without the task: it is checkpointed and released
    await stream.until(lambda: stream.of("parts", "released"))
    mesh.alignment.pause_seconds = 0.0
    recorded = stream.of("parts", "checkpoint_committed")[-1]
    assert 2 <= recorded.step < 6
    stream.send(
        plan_of(versions.next(), planned("parts", attempt=2, num_steps=6, version="same", resume_from=recorded))
    )
    await stream.until_finished("parts")
    assert [done.step for done in stream.of("parts", "step_done")] == [1, 2, 3, 4, 5, 6]
    (parts,) = stream.of("parts", "finished")
    expected, resumed = weights(mesh, whole.adapter_key), weights(mesh, parts.adapter_key)
    assert all(np.array_equal(expected[name], resumed[name]) for name in expected)
    await stream.close()


async def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream()
    stream.send(plan_of(versions.next(), planned("sound", num_steps=8, version="same")))
    await stream.until_finished("sound")
    mesh.alignment.pause_seconds = 0.05
    stream.send(plan_of(versions.next(), planned("rotten", num_steps=8, version="same")))
    await stream.until(lambda: len(stream.of("rotten", "checkpoint_committed")) >= 2)
    stream.send(plan_of(versions.next()))
    await stream.until(lambda: stream.of("rotten", "released"))
    mesh.alignment.pause_seconds = 0.0
    before, last = stream.of("rotten", "checkpoint_committed")[-2:]
    (file,) = (mesh.artifacts / last.manifest_key).parent.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    stream.send(plan_of(versions.next(), planned("rotten", attempt=2, num_steps=8, version="same", resume_from=last)))
    await stream.until_finished("rotten")
    (resumed,) = stream.of("rotten", "resumed")
    assert resumed.checkpoint == before and f"step {last.step} cannot be read" in resumed.message
    (sound,), (rotten,) = stream.of("sound", "finished"), stream.of("rotten", "finished")
    expected, resumed = weights(mesh, sound.adapter_key), weights(mesh, rotten.adapter_key)
    assert all(np.array_equal(expected[name], resumed[name]) for name in expected)
    await stream.close()


async def test_a_cancelled_task_keeps_its_adapter(mesh: Mesh, versions: Versions, tiny_backbone: Path) -> None:
    stream = await mesh.open_stream()
    mesh.alignment.pause_seconds = 0.02
    stream.send(plan_of(versions.next(), planned("c", num_steps=1000), planned("n", num_steps=1000)))
    await stream.until(lambda: len(stream.of("c", "step_done")) >= 2)
    stream.send(plan_of(versions.next(), planned("c", num_steps=1000, cancel=True), planned("n", num_steps=1000)))
    await stream.until_finished("c")
    (finished,) = stream.of("c", "finished")
    assert finished.cancelled
    assert finished.step == len(stream.of("c", "step_done"))
    load_adapter(mesh, finished.adapter_key, tiny_backbone)
    steps = len(stream.of("n", "step_done"))
    await stream.until(lambda: len(stream.of("n", "step_done")) > steps)  # the neighbour continues
    stream.send(plan_of(versions.next(), planned("n", num_steps=1000, cancel=True)))
    await stream.until_finished("n")
    mesh.alignment.pause_seconds = 0.0
    await stream.close()


async def test_cancelled_before_its_first_step_a_task_leaves_no_adapter(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream()
    stream.send(plan_of(versions.next(), planned("early", cancel=True)))
    await stream.until_finished("early")
    (finished,) = stream.of("early", "finished")
    assert (finished.step, finished.cancelled, finished.adapter_key) == (0, True, "")
    await stream.close()


async def test_a_bad_task_fails_alone(mesh: Mesh, versions: Versions) -> None:
    prefix = "tenants/t/tasks/corrupt/checkpoints/00000002-1"
    manifest = ArtifactStore.open(mesh.settings.artifact_url).commit_folder(
        prefix, {"state.safetensors": b"as committed"}, {"step": 2}
    )
    (written,) = (mesh.artifacts / prefix).rglob("state.safetensors")
    written.write_bytes(b"as found later")
    resume = {"step": 2, "manifest_key": manifest.key}
    adapters = {name: broken_adapter(mesh, name) for name in ("rotten", "garbled")}
    stream = await mesh.open_stream()
    stream.send(
        plan_of(
            versions.next(),
            planned("good", num_steps=3),
            planned("nodata", version=BAD_VERSION),
            planned("corrupt", attempt=2, resume_from=resume),
            planned("notarget", targets=["no_such_proj"]),
            planned("noadapter", initial_adapter_key="tenants/t/adapters/none/1/manifest.json"),
            *(planned(name, initial_adapter_key=key) for name, key in adapters.items()),
            planned("diverges", num_steps=50, training={"learning_rate": 1e30, "max_grad_norm": 0.0}),
        )
    )
    bad = {
        "nodata": errors_pb2.ERROR_REASON_INVALID_INPUT,
        "corrupt": errors_pb2.ERROR_REASON_ARTIFACT_CORRUPT,
        "notarget": errors_pb2.ERROR_REASON_INVALID_INPUT,
        "noadapter": errors_pb2.ERROR_REASON_NOT_FOUND,
        "rotten": errors_pb2.ERROR_REASON_ARTIFACT_CORRUPT,
        "garbled": errors_pb2.ERROR_REASON_INVALID_INPUT,
        "diverges": errors_pb2.ERROR_REASON_NON_FINITE,
    }
    await stream.until(lambda: all(stream.of(task, "failed") for task in bad))
    await stream.until_finished("good")
    assert {task: stream.of(task, "failed")[0].reason for task in bad} == bad
    assert [done.step for done in stream.of("good", "step_done")] == [1, 2, 3]
    await stream.close()


def broken_adapter(mesh: Mesh, name: str) -> str:
    """Returns the manifest key of an adapter with weights that are not safetensors or, if "rotten", changed on the
    disk."""
    prefix = f"tenants/t/adapters/{name}/1"
    files = {"adapter_config.json": b'{"peft_type": "LORA", "r": 4}', "adapter_model.safetensors": b"\xff" * 99}
    key: str = ArtifactStore.open(mesh.settings.artifact_url).commit_folder(prefix, files, {}).key
    if name == "rotten":
        (written,) = (mesh.artifacts / prefix).rglob("adapter_model.safetensors")
        written.write_bytes(b"\xfe" * 99)
    return key


async def test_a_plan_larger_than_a_message_arrives_whole(mesh: Mesh, versions: Versions) -> None:
    """Specs of 256 KiB from before their limit: the tenants' others train, and no part counts as the whole plan."""
    stream = await mesh.open_stream()
    large = [planned(f"large-{i}") for i in range(80)]
    for task in large:
        task.spec.labels["x"] = "y" * (250 << 10)
        task.spec.ClearField("method")  # fails alone, at once
    plan = plan_of(versions.next(), *large, planned("beside-large"))
    assert plan.ByteSize() > 16 << 20
    stream.send(plan)
    await stream.until(lambda: all(stream.of(f"large-{i}", "failed") for i in range(80)))
    await stream.until_finished("beside-large")
    await stream.close()


async def test_two_htasks_of_a_plan_interleave(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream()
    one, two = planned("one", num_steps=3), planned("two", num_steps=3)
    stream.send(plan_of(versions.next(), one, two, htasks=[[one.task], [two.task]]))
    await stream.until_finished("one", "two")
    steps = [result.task for result in stream.results if kind_of(result) == "step_done"]
    order = [task.rpartition("/")[2] for task in steps if task in (one.task, two.task)]
    assert order == ["one", "two"] * 3
    assert stream.of("one", "step_done")[0].num_neighbours == 0
    await stream.close()


async def test_a_failing_alignment_stream_changes_no_loss(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream()
    accumulates = {"micro_batch_size": 1}
    stream.send(plan_of(versions.next(), planned("steady", version="x", training=accumulates)))
    await stream.until_finished("steady")
    mesh.alignment.num_failures = 2
    stream.send(plan_of(versions.next(), planned("shaken", version="x", training=accumulates)))
    await stream.until_finished("shaken")
    steady, interrupted = ([done.loss for done in stream.of(t, "step_done")] for t in ("steady", "shaken"))
    assert interrupted == pytest.approx(steady, rel=1e-6)
    await stream.close()


async def test_early_stop_ends_a_task_with_its_adapter(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream()
    patient = {
        "heldout_fraction": 0.2,
        "evaluate_every_steps": 1,
        "early_stop_patience": 2,
        "early_stop_min_delta": 9.0,
    }
    stream.send(plan_of(versions.next(), planned("stopped", num_steps=50, training=patient)))
    await stream.until_finished("stopped")
    (finished,) = stream.of("stopped", "finished")
    assert finished.message.startswith("early stop")
    assert finished.step < 5
    assert finished.adapter_key
    await stream.close()


async def test_an_adapter_is_exported_while_its_task_continues(
    mesh: Mesh, versions: Versions, tiny_backbone: Path
) -> None:
    stream = await mesh.open_stream()
    mesh.alignment.pause_seconds = 0.02
    stream.send(plan_of(versions.next(), planned("live", num_steps=1000)))
    await stream.until(lambda: stream.of("live", "step_done"))
    exported = await mesh.stub.ExportAdapter(execution_pb2.ExportAdapterRequest(task="tenants/t/tasks/live"))
    load_adapter(mesh, exported.adapter_key, tiny_backbone)
    described = await mesh.stub.DescribeExecutor(execution_pb2.DescribeExecutorRequest())
    assert list(described.tasks) == ["tenants/t/tasks/live"]
    assert described.task_bytes["tenants/t/tasks/live"] > 0
    assert described.executor.backbone.num_layers == 2
    steps = len(stream.of("live", "step_done"))
    await stream.until(lambda: len(stream.of("live", "step_done")) > steps)
    stream.send(plan_of(versions.next(), planned("live", num_steps=1000, cancel=True)))
    await stream.until_finished("live")
    mesh.alignment.pause_seconds = 0.0
    with pytest.raises(NotFoundError):
        await mesh.stub.ExportAdapter(execution_pb2.ExportAdapterRequest(task="tenants/t/tasks/unknown"))
    await stream.close()


async def test_a_broken_stream_loses_no_result_and_pauses_the_tasks(mesh: Mesh, versions: Versions) -> None:
    silent = await mesh.open_stream(acknowledges=False)
    mesh.alignment.pause_seconds = 0.02
    plan = plan_of(versions.next(), planned("held", num_steps=30))
    silent.send(plan)
    await silent.until(lambda: len(silent.of("held", "step_done")) >= 3)
    await silent.close()
    await asyncio.sleep(1.0)  # enough for all thirty steps, if it continued
    again = await mesh.open_stream()
    await again.until(lambda: len(again.of("held", "step_done")) >= 3)
    seen = len(again.of("held", "step_done"))
    assert seen < 25
    plan.version = versions.next()
    again.send(plan)
    await again.until_finished("held")
    mesh.alignment.pause_seconds = 0.0
    steps = [done.step for done in again.of("held", "step_done")]
    assert steps == list(range(1, 31))
    assert again.responses[0].sequence == silent.responses[0].sequence
    await again.close()


async def test_unacknowledged_results_pause_the_tasks(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream(acknowledges=False)
    mesh.alignment.pause_seconds = 0.02
    stream.send(plan_of(versions.next(), planned("unheard", num_steps=40)))
    await stream.until(lambda: len(stream.responses) >= 8)
    await asyncio.sleep(0.5)
    assert len(stream.of("unheard", "step_done")) < 20
    while not stream.of("unheard", "finished"):
        seen = len(stream.responses)
        stream.send(acknowledged=stream.responses[-1].sequence)
        await stream.until(lambda seen=seen: len(stream.responses) > seen)
    mesh.alignment.pause_seconds = 0.0
    assert [done.step for done in stream.of("unheard", "step_done")] == list(range(1, 41))
    stream.send(acknowledged=stream.responses[-1].sequence)
    await stream.close()


async def test_health_is_open_and_everything_else_needs_the_secret(mesh: Mesh) -> None:
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="muxtune.v1.ExecutionService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary("/muxtune.v1.ExecutionService/Drain")(b"")
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_newest_stream_wins_and_a_wrong_lease_is_refused(mesh: Mesh) -> None:
    old = await mesh.open_stream()
    wrong = await mesh.open_stream(lease_term=mesh.scheduling.term + 7)
    with pytest.raises(LeaseLostError):
        await wrong.reading
    new = await mesh.open_stream()
    with pytest.raises(SupersededError):
        async with asyncio.timeout(10):
            await old.reading
    assert not new.reading.done()
    await new.close()


async def test_stale_tasks_are_dropped_without_a_result(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream()
    mesh.alignment.pause_seconds = 0.02
    stream.send(plan_of(versions.next(), planned("stale", num_steps=1000), planned("kept", num_steps=20)))
    await stream.until(lambda: stream.of("stale", "step_done"))
    stream.send(stale=("tenants/t/tasks/stale",))
    await stream.until_finished("kept")
    mesh.alignment.pause_seconds = 0.0
    assert not [
        r for r in stream.results if r.task.endswith("/stale") and kind_of(r) in ("released", "failed", "finished")
    ]
    assert len(stream.of("stale", "step_done")) < 20
    await stream.close()


async def test_spans_join_the_tasks_own_traces_and_hold_no_tokens(mesh: Mesh, versions: Versions) -> None:
    stream = await mesh.open_stream()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    task = planned("traced", num_steps=2, trace_parent=f"00-{trace_id}-b7ad6b7169203331-01")
    stream.send(plan_of(versions.next(), task))
    await stream.until_finished("traced")
    stream.send(plan_of(versions.next(), planned("after", num_steps=1)))  # ends the window
    await stream.until_finished("after")
    await stream.close()

    def spans() -> list[dict[str, Any]]:
        path = mesh.settings.trace_file
        lines = path.read_text().splitlines() if path and path.exists() else []
        scopes = [s for line in lines for r in json.loads(line)["resourceSpans"] for s in r["scopeSpans"]]
        return [span for scope in scopes for span in scope["spans"]]

    def is_whole() -> bool:
        all_spans = spans()
        task_spans = {span["name"] for span in all_spans if span["traceId"] == trace_id}
        is_linked = any(link["traceId"] == trace_id for span in all_spans for link in span.get("links", []))
        return is_linked and {"attach", "checkpoint", "export"} <= task_spans

    async with asyncio.timeout(30):
        while not is_whole():  # noqa: ASYNC110
            await asyncio.sleep(0.2)  # another process writes the file in batches
