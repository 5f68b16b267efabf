"""The four processes with two tenants: what one of them makes large stops nothing for the other, over a restart too."""

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from muxtune.cli.main import app
from muxtune.client import Client
from muxtune.errors import InvalidInputError, QuotaExceededError
from muxtune.local.mesh import Mesh
from muxtune.v1 import scheduling_pb2, scheduling_pb2_grpc, task_pb2
from tests.tiny_backbone import write_backbone

ROWS = [{"text": "the quick brown fox " * (1 + i % 3)} for i in range(20)]
MAX_SPEC_BYTES, OLD_SPEC_BYTES, MESSAGE_BYTES = 16 << 10, 256 << 10, 4 << 20
LIMIT = 70  # specs of the largest size: MUXTUNE_MAX_UNFINISHED_SPEC_BYTES is small here, so that the test is quick
SETTINGS = {
    "execution": {"MUXTUNE_CALIBRATION_SECONDS": "0", "MUXTUNE_CHECKPOINT_STEPS": "100000"},
    "admission": {"MUXTUNE_MAX_UNFINISHED_SPEC_BYTES": str(LIMIT * 8800)},  # 8.8 kB once names are there only once
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path / "mesh", {"tiny": write_backbone(tmp_path / "tiny")}, environment=SETTINGS) as running:
        yield running


def spec(dataset: str, num_steps: int, num_bytes: int = 0) -> task_pb2.TaskSpec:
    """Return a spec, of at least so many bytes."""
    training = task_pb2.Training(learning_rate=0.01, num_steps=num_steps, global_batch_size=2, max_sequence_tokens=32)
    lora = task_pb2.Lora(rank=2, target_modules=["q_proj"])
    result = task_pb2.TaskSpec(backbone="tiny", dataset=dataset, lora=lora, training=training)
    if num_bytes:
        result.labels.update({f"label-{i:02}".ljust(63, "x"): "y" * 63 for i in range(64)})
        result.lora.target_modules.extend(["q_proj"] * ((num_bytes - result.ByteSize()) // 8))
    return result


def train_five_steps(client: Client, dataset: str) -> None:
    task = client.create_task(spec(dataset, 5))
    assert client.wait_task(task.name).state == task_pb2.TASK_STATE_SUCCEEDED


def show_plan(mesh: Mesh) -> None:
    """Wait until operators see both tenants in the plan, with the command; check that its pages are small."""
    deadline = time.monotonic() + 60
    while "tenants/bad" not in plan_text(mesh):  # new tasks are planned in turns of their tenants
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with mesh.operator_channel("scheduling") as channel:
        stub, token = scheduling_pb2_grpc.SchedulingServiceStub(channel), None
        while token != "":
            page = stub.GetPlan(scheduling_pb2.GetPlanRequest(page_token=token or ""), timeout=30)
            assert page.ByteSize() < MESSAGE_BYTES
            token = page.next_page_token


def plan_text(mesh: Mesh) -> str:
    shown = CliRunner().invoke(app, ["plan", "get", "--data", str(mesh.data)])
    assert shown.exit_code == 0, shown.output
    return shown.output


def grow_specs(mesh: Mesh, num_bytes: int) -> int:
    """Give the tasks of tenant bad, in the stopped mesh's database, specs that earlier versions accepted."""
    with sqlite3.connect(mesh.data / "admission.db") as database:
        rows = database.execute("SELECT name, spec FROM tasks WHERE tenant = 'tenants/bad'").fetchall()
        for name, stored in rows:
            old = task_pb2.TaskSpec.FromString(stored)
            old.lora.target_modules.extend(["q_proj"] * ((num_bytes - old.ByteSize()) // 8))
            old.MergeFromString(bytes.fromhex("fa3f03616263"))  # and a field that no version knows
            database.execute("UPDATE tasks SET spec = ? WHERE name = ?", (old.SerializeToString(), name))
    return len(rows)


@pytest.mark.timeout(300)
def test_large_specs_of_one_tenant_stop_nothing_for_another(mesh: Mesh) -> None:
    with mesh.client(mesh.create_key("tenants/good")) as good, mesh.client(mesh.create_key("tenants/bad")) as bad:
        honest, hostile = good.upload_dataset(ROWS).name, bad.upload_dataset(ROWS).name
        running = good.create_task(spec(honest, 10_000_000)).name
        with pytest.raises(InvalidInputError, match="spec: must have at most 16384 bytes"):
            bad.create_task(spec(hostile, 10, OLD_SPEC_BYTES))

        def create(_: int) -> bool:
            try:
                bad.create_task(spec(hostile, 10_000_000, MAX_SPEC_BYTES))
            except QuotaExceededError:
                return False
            return True

        with ThreadPoolExecutor(4) as threads:
            assert LIMIT <= sum(threads.map(create, range(LIMIT + 30))) < LIMIT + 30
        train_five_steps(good, honest)
        show_plan(mesh)
        assert len(list(bad.list_tasks(page_size=1000))) >= LIMIT
        before = good.get_task(running).progress.step
    mesh.stop()
    # The database of an earlier version: 70 specs of 256 KiB were more than a message, and nothing was scheduled.
    assert grow_specs(mesh, OLD_SPEC_BYTES) >= LIMIT
    mesh.start()
    with mesh.client(mesh.create_key("tenants/good")) as good, mesh.client(mesh.create_key("tenants/bad")) as bad:
        train_five_steps(good, honest)
        for event in good.watch_task(running):
            if event.step_done.step > before:  # it goes on
                break
        show_plan(mesh)
        names = [task.name for task in bad.list_tasks(page_size=1000)]
        assert len(names) >= LIMIT and bad.get_task(names[0]).spec.ByteSize() > OLD_SPEC_BYTES - 100
        with pytest.raises(QuotaExceededError, match="wait for a task or cancel one"):
            bad.create_task(spec(hostile, 10_000_000, MAX_SPEC_BYTES))
    logs = {service: mesh.log_of(service).read_text() for service in ("admission", "scheduling")}
    assert not any('"ERROR"' in log or "larger than max" in log for log in logs.values())
