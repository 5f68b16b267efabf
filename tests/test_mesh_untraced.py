"""The whole mesh while its tracing backend takes connections and says nothing: tasks, answers and ends as ever."""

from pathlib import Path

import pytest

from muxtune.local.mesh import START_ORDER, Mesh
from muxtune.v1 import task_pb2
from tests.services.test_collector_away import accepts_and_is_silent
from tests.tiny_backbone import write_backbone

ROWS = [{"prompt": f"fox {i}", "completion": " jumps over" * (1 + i % 4)} for i in range(16)]
QUICK = {"execution": {"MUXTUNE_NUM_THREADS": "1", "MUXTUNE_CALIBRATION_SECONDS": "0.1"}}


@pytest.mark.thorough
def test_tasks_end_and_services_stop_with_a_silent_collector(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "tiny")
    with accepts_and_is_silent() as endpoint:
        mesh = Mesh(tmp_path / "mesh", {"tiny": backbone}, otlp_endpoint=endpoint, environment=QUICK)
        with mesh, mesh.client() as client:
            spec = task_pb2.TaskSpec(
                backbone="tiny",
                dataset=client.upload_dataset(ROWS).name,
                lora=task_pb2.Lora(rank=4, target_modules=["q_proj", "v_proj"]),
                training=task_pb2.Training(learning_rate=0.01, num_steps=10, max_sequence_tokens=64),
            )
            names = [client.create_task(spec).name for _ in range(3)]
            for name in names:
                assert client.wait_task(name).state == task_pb2.TASK_STATE_SUCCEEDED
                assert client.download_adapter(name, tmp_path / name.replace("/", "-")).is_dir()
            assert mesh.stop() == dict.fromkeys(START_ORDER, 0)
