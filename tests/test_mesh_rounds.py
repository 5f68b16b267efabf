"""Compares the planner's predictions for a running mesh of four processes with the times that follow."""

from collections.abc import Iterator

import pytest

from muxtune.local.mesh import Mesh
from muxtune.v1 import plan_pb2, scheduling_pb2, scheduling_pb2_grpc, task_pb2
from tests.tiny_backbone import write_backbone

NUM_STEPS, WINDOW = 70, 20  # rounds over which a prediction is held against the clock
ASKED_AT = range(20, NUM_STEPS - WINDOW + 1, 5)
ROWS = [{"text": " ".join(["a row of words to learn from"] * (1 + i % 5))} for i in range(64)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Run a mesh with a backbone so large that microbatches take most of a round."""
    folder = tmp_path_factory.mktemp("rounds")
    backbone = write_backbone(folder / "backbone", hidden_size=192, intermediate_size=512, num_hidden_layers=6)
    environment = {"execution": {"MUXTUNE_NUM_THREADS": "1", "MUXTUNE_CHECKPOINT_STEPS": "1000"}}
    with Mesh(folder / "mesh", {"tiny": backbone}, environment=environment) as running:
        yield running


@pytest.mark.thorough
def test_rounds_and_the_end_come_as_the_planner_says(mesh: Mesh) -> None:
    """Three tasks of different lengths. Predictions are read repeatedly, once costs were corrected by measured rounds.
    Other processes may slow the trainer before or after a prediction, so the closest one counts and must be within a
    factor of two; benchmarks/planner.py measures the errors of predictions."""
    with mesh.client() as client:
        dataset = client.upload_dataset(ROWS).name
        names = [client.create_task(spec(dataset, i)).name for i in range(3)]
        seconds: dict[int, float] = {}
        explanations: dict[int, plan_pb2.TaskExplanation] = {}
        for event in client.watch_task(names[0]):
            if event.WhichOneof("event") != "step_done":
                continue
            seconds[event.step_done.step] = event.time.ToNanoseconds() / 1e9
            if event.step_done.step in ASKED_AT:
                explanations[event.step_done.step] = explanation(mesh, names[0])
        assert client.get_task(names[0]).state == task_pb2.TASK_STATE_SUCCEEDED
    assert all(len(explained.neighbours) == 2 for explained in explanations.values())
    rounds = [explanations[step].round_seconds * WINDOW / (seconds[step + WINDOW] - seconds[step]) for step in ASKED_AT]
    ends = [explanations[step].predicted_seconds_left / (seconds[NUM_STEPS] - seconds[step]) for step in ASKED_AT]
    assert min(max(ratio, 1 / ratio) for ratio in rounds) < 2, rounds
    assert min(max(ratio, 1 / ratio) for ratio in ends) < 2, ends


def spec(dataset: str, index: int) -> task_pb2.TaskSpec:
    training = task_pb2.Training(
        learning_rate=1e-4, num_steps=NUM_STEPS, max_sequence_tokens=64, micro_batch_size=2 + index,
        global_batch_size=(8, 4, 12)[index], seed=index,
    )  # fmt: skip
    lora = task_pb2.Lora(
        rank=(4, 8, 16)[index], alpha=8, target_modules=(["q_proj"], ["q_proj", "v_proj"], ["all-linear"])[index]
    )
    return task_pb2.TaskSpec(backbone="tiny", dataset=dataset, lora=lora, training=training)


def explanation(mesh: Mesh, task: str) -> plan_pb2.TaskExplanation:
    with mesh.operator_channel("scheduling") as channel:
        stub = scheduling_pb2_grpc.SchedulingServiceStub(channel)
        return stub.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=task), timeout=30).explanation
