"""The four processes with the storage of a platform: rows in PostgreSQL, artifacts in S3 (by moto)."""

from pathlib import Path

import boto3
import pytest

from muxtune.local.mesh import Mesh
from muxtune.v1 import task_pb2
from tests.platform_storage import platform_storage
from tests.tiny_backbone import write_backbone

QUICK = {"MUXTUNE_NUM_THREADS": "1", "MUXTUNE_CHECKPOINT_STEPS": "3", "MUXTUNE_CALIBRATION_SECONDS": "0.1"}
ROWS = [{"prompt": f"fox {i}", "completion": " jumps over" * (1 + i % 4)} for i in range(16)]


@pytest.mark.thorough
def test_a_task_lives_through_a_restart_on_postgresql_and_s3(tmp_path: Path) -> None:
    with platform_storage() as settings:
        train_with_a_restart(tmp_path, settings)
        keys = [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket="muxtune")["Contents"]]
    assert not (tmp_path / "mesh" / "admission.db").exists()
    assert not (tmp_path / "mesh" / "artifacts").exists()
    assert any("/datasets/" in key for key in keys)
    assert any("/adapters/" in key for key in keys)


def train_with_a_restart(folder: Path, everywhere: dict[str, str]) -> None:
    backbone = write_backbone(folder / "tiny")
    environment = {"*": everywhere, "execution": QUICK}
    spec = task_pb2.TaskSpec(
        backbone="tiny",
        lora=task_pb2.Lora(rank=4, target_modules=["q_proj", "v_proj"]),
        training=task_pb2.Training(learning_rate=0.01, num_steps=60, global_batch_size=4, max_sequence_tokens=64),
    )
    mesh = Mesh(folder / "mesh", {"tiny": backbone}, environment=environment)
    with mesh, mesh.client() as client:
        spec.dataset = client.upload_dataset(ROWS).name
        task = client.create_task(spec)
        for event in client.watch_task(task.name):
            if event.step_done.step >= 4:
                break
    again = Mesh(folder / "mesh", {"tiny": backbone}, environment=environment)
    with again, again.client() as client:
        sequences = [event.sequence for event in client.watch_task(task.name)]
        assert sequences == list(range(1, len(sequences) + 1))
        ended = client.get_task(task.name)
        assert (ended.state, ended.progress.step) == (task_pb2.TASK_STATE_SUCCEEDED, 60)
        assert client.download_adapter(task.name, folder / "adapter").is_dir()
