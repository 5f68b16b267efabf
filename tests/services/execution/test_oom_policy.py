"""With too little memory, microbatches halve, and a task that does not fit leaves its hTask, then fails.

No other result changes.
"""

from pathlib import Path

import numpy as np
import pytest

from engine.alignment.packing import PackedTask, rounds
from engine.task import Training
from muxtune.v1 import errors_pb2, plan_pb2
from services.execution.trainer.oom_policy import OutOfMemoryPolicy
from services.failpoints import TOKENS, VARIABLE
from services.storage.artifact_store import ArtifactStore
from tests.services.execution.executor_mesh import Mesh, dataset_of, plan_of, planned, running_mesh
from tests.thoroughness import seeds

CHUNK = 16


@pytest.mark.timeout(120)
async def test_tasks_that_fit_get_the_same_results_and_one_that_does_not_fails_with_its_tokens(
    tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have 4 to 19 tokens: in chunks of 16 some microbatches of one row hold 16 tokens, others 32."""
    (tmp_path / "failpoints").mkdir()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "failpoints"))
    limit = tmp_path / "failpoints" / TOKENS
    short = next(name for name in map(str, range(99)) if longest(name) <= CHUNK)
    long = next(name for name in map(str, range(99)) if longest(name) > CHUNK)
    async with running_mesh(tmp_path, tiny_backbone, calibration_seconds=0.1) as mesh:
        stream = await mesh.open_stream()
        stream.send(plan_of(1, planned("calm", version=short, num_steps=4)))
        await stream.until_finished("calm")
        limit.write_text(str(CHUNK))
        stream.send(
            plan_of(2, planned("fits", version=short), planned("large", version=long), planned("too", version=short))
        )
        await stream.until_finished("fits", "too")
        await stream.until(lambda: stream.of("large", "failed"))
        (failure,) = stream.of("large", "failed")
        assert failure.reason == errors_pb2.ERROR_REASON_WILL_NEVER_FIT
        assert "32 tokens" in failure.message and failure.metadata["tokens"] == "32"
        (unlimited,), (fits,) = stream.of("calm", "finished"), stream.of("fits", "finished")
        assert_equal_weights(mesh, unlimited.adapter_key, fits.adapter_key)
        for done, wanted in zip(stream.of("fits", "step_done"), stream.of("calm", "step_done"), strict=True):
            assert done.loss == pytest.approx(wanted.loss, rel=1e-6)
            assert done.effective_tokens == wanted.effective_tokens
            assert done.input_digest == wanted.input_digest != b""  # in more and smaller microbatches the same


def longest(version: str) -> int:
    return int(dataset_of(version).original_lengths.max())


def assert_equal_weights(mesh: Mesh, one: str, other: str) -> None:
    from safetensors.numpy import load

    store = ArtifactStore.open(mesh.settings.artifact_url)
    first, second = (load(store.read_folder(key)[1]["adapter_model.safetensors"]) for key in (one, other))
    for name, tensor in first.items():
        np.testing.assert_allclose(second[name], tensor, rtol=1e-5, atol=1e-6)


def run_with(plan: plan_pb2.ExecutorPlan, members: dict[str, PackedTask], allowed: int) -> tuple[set[str], int]:
    """Runs a round of every hTask on a device with room for `allowed` tokens.

    Returns the tasks that fail, and the number of out-of-memory errors.
    """
    policy, failed, num_failures, index = OutOfMemoryPolicy(), set[str](), 0, 0
    while index < len(plan.htasks):
        htask = plan.htasks[index]
        going = [members[name] for name in htask.tasks if name not in failed]
        stream = rounds(going, policy.token_budget(htask), CHUNK) if going else iter(())
        for microbatch in stream:
            if microbatch.num_tokens > allowed:
                num_failures += 1
                if (name := policy.reduce_memory(plan, index, microbatch)) is not None:
                    failed.add(name)
                break
            if microbatch.is_last_in_round:
                index += 1
                break
        else:
            index += 1
    return failed, num_failures


@pytest.mark.parametrize("seed", seeds(40, 20))
def test_the_policy_terminates_and_fails_only_tasks_that_cannot_fit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    names = [f"{seed}-{i}" for i in range(draw.integers(1, 6))]
    training = Training(learning_rate=1, num_steps=1, global_batch_size=12, micro_batch_size=int(draw.integers(1, 9)))
    members = {name: PackedTask(name, dataset_of(name), training, 1, 0) for name in names}
    allowed = CHUNK * int(draw.integers(1, 4))
    plan = plan_pb2.ExecutorPlan(htasks=[plan_pb2.HTask(tasks=names, token_budget=256, chunk_tokens=CHUNK)])
    failed, num_failures = run_with(plan, members, allowed)
    assert failed == {name for name in names if longest(name) > allowed}
    assert num_failures <= 5 * len(names) + 2 * len(names)
