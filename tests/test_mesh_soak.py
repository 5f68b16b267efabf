"""Hours of arrivals, cancellations and kills in small: no service grows, nor does the trainer that took the place of
the one that was killed. MUXTUNE_TESTS=long makes it half an hour.

Memory, file descriptors and threads are sampled of every process; slopes are printed.
"""

import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from muxtune.client import FINAL_STATES, Client
from muxtune.local.mesh import START_ORDER, Mesh
from muxtune.v1 import task_pb2
from tests.mesh_chaos import TRAINER, Chaos, long_mode, printed_seed, trainer_of
from tests.tiny_backbone import write_backbone

SECONDS = 1800.0 if long_mode() else 120.0
WARM_UP = 0.2  # of that time: caches fill, allocators settle
EVERY_SECONDS, NUM_AT_ONCE, END_SECONDS = 0.5, 6, 120.0
MAX_BYTES_A_SECOND = 3_000 if long_mode() else 150_000  # a minute of a young process says little
MAX_MORE_FILES, MAX_MORE_THREADS = 12, 12  # a connection here, a pool's thread there
QUICK = {
    # Full when the warm-up ends, as the tokenizer's own cache of words is: what fills up looks like a leak.
    "alignment": {"MUXTUNE_TOKENIZED_CACHE_BYTES": "500000"},
    "execution": {
        "MUXTUNE_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MUXTUNE_CHECKPOINT_STEPS": "5",
        "MUXTUNE_CALIBRATION_SECONDS": "0.1",
    },
}
Sample = tuple[float, int, int, int]  # seconds, bytes resident, file descriptors, threads


def sample(pid: int) -> Sample | None:
    """None where the process is gone."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return time.monotonic(), int(status["VmRSS"].split()[0]) << 10, files, int(status["Threads"])
    except (OSError, KeyError):
        return None


def problems(name: str, samples: Sequence[Sample]) -> list[str]:
    """What grew."""
    seconds, resident, files, threads = np.array(samples, dtype=float).T
    slope = np.polyfit(seconds - seconds[0], resident, 1)[0]
    print(f"{name}: {resident[0] / 1e6:.1f} to {resident[-1] / 1e6:.1f} MB in {seconds[-1] - seconds[0]:.0f} s,",
          f"{slope / 1e3:+.1f} kB/s; {files[0]:.0f} to {files[-1]:.0f} files;",
          f"{threads[0]:.0f} to {threads[-1]:.0f} threads")  # fmt: skip
    half = len(samples) // 2
    grew = {
        "memory": slope > MAX_BYTES_A_SECOND,
        "files": np.median(files[half:]) > np.median(files[:half]) + MAX_MORE_FILES,
        "threads": np.median(threads[half:]) > np.median(threads[:half]) + MAX_MORE_THREADS,
    }
    return [f"{name}: {what}" for what, is_so in grew.items() if is_so]


def spec(dataset: str, chance: random.Random) -> task_pb2.TaskSpec:
    return task_pb2.TaskSpec(
        backbone="tiny",
        dataset=dataset,
        lora=task_pb2.Lora(rank=chance.choice([1, 4, 16]), target_modules=["q_proj", "down_proj"]),
        training=task_pb2.Training(
            learning_rate=0.01, num_steps=chance.randint(1, 12), global_batch_size=4, max_sequence_tokens=64
        ),
    )


class Tenant:
    """Uploads, creates, cancels, deletes, watches a little and turns away."""

    def __init__(self, client: Client, chance: random.Random) -> None:
        self._client, self._chance, self.names = client, chance, list[str]()

    def act(self) -> None:
        rows = [{"text": f"row {self._chance.randrange(1000)} of many"} for _ in range(self._chance.randint(1, 30))]
        dataset = self._client.upload_dataset(rows).name
        unfinished = [task.name for task in self._client.list_tasks() if task.state not in FINAL_STATES]
        if len(unfinished) < NUM_AT_ONCE:
            self.names.append(self._client.create_task(spec(dataset, self._chance)).name)
            next(self._client.watch_task(self.names[-1]))
        elif self._chance.random() < 0.5:
            self._client.cancel_task(self._chance.choice(unfinished))
        else:
            self._client.delete_dataset(self._client.upload_dataset([*rows, *rows]).name)


def until_swept(store: Path) -> None:
    """No checkpoint is left of tasks that ended: they go a moment after."""
    deadline = time.monotonic() + END_SECONDS
    while left := [folder for folder, _, files in os.walk(store) if files and "/checkpoints/" in folder]:
        assert time.monotonic() < deadline, left
        time.sleep(EVERY_SECONDS)


@pytest.mark.timeout(SECONDS + END_SECONDS + 300)
def test_a_mesh_at_work_does_not_grow_and_leaves_nothing_behind(tmp_path: Path) -> None:
    chance = random.Random(printed_seed())
    backbone = write_backbone(tmp_path / "tiny")
    samples: defaultdict[tuple[str, int], list[Sample]] = defaultdict(list)
    mesh = Mesh(tmp_path / "mesh", {"tiny": backbone}, environment=QUICK)
    with mesh, mesh.client() as client:
        chaos, tenant = Chaos(mesh, chance), Tenant(client, chance)
        started = time.monotonic()
        next_kill = started + SECONDS / 4
        while (now := time.monotonic()) < started + SECONDS:
            tenant.act()
            if now > next_kill:  # the trainer, whose death others have to cope with
                chaos.kill(TRAINER)
                next_kill = now + 0.7 * SECONDS
            if now > started + WARM_UP * SECONDS:
                pids = {service: mesh.processes[service].pid for service in START_ORDER} | {TRAINER: trainer_of(mesh)}
                for key in pids.items():
                    if (found := sample(key[1])) is not None:
                        samples[key].append(found)
            time.sleep(EVERY_SECONDS)
        assert mesh.dead_services() == {}
        states = [client.wait_task(name).state for name in tenant.names]
        assert set(states) <= {task_pb2.TASK_STATE_SUCCEEDED, task_pb2.TASK_STATE_CANCELLED}
        until_swept(mesh.data / "artifacts")
        print(f"{len(states)} tasks, {states.count(task_pb2.TASK_STATE_CANCELLED)} of them cancelled")
    judged, grew = set(), list[str]()
    for (name, _), taken in samples.items():
        taken = taken[len(taken) // 3 :]  # one that was started meanwhile loads first
        if taken[-1][0] - taken[0][0] > SECONDS / 4:
            grew += problems(name, taken)
            judged.add(name)
    assert judged == {*START_ORDER, TRAINER} and not grew
