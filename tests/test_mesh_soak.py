"""A mesh at work: tasks come, end, are cancelled, the trainer is killed; no service grows, and nothing is left behind.

Memory is judged by what each process holds while nothing runs, not by what the system lends it: bytes of all reachable
Python objects, and of malloc, counted between batches of tasks (tests/heap_census). A leak shows in every batch; a
cache that still fills, or noise, does not. MUXTUNE_TESTS=long makes it half an hour.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from muxtune.client import Client
from muxtune.errors import IllegalTransitionError
from muxtune.local.mesh import START_ORDER, Mesh
from muxtune.task_states import FINAL_STATES
from muxtune.v1 import task_pb2
from tests.mesh_chaos import TRAINER, Chaos, long_mode, printed_seed, trainer_of
from tests.tiny_backbone import write_backbone

CENSUS = Path(__file__).parent / "heap_census"
NUM_AT_ONCE, END_SECONDS, POLL_SECONDS = 6, 120.0, 0.05
SETTLE_POLL_SECONDS, NOISE_BYTES = 1.0, 2000
NUM_WARM_UP, NUM_BATCHES = 70, 3  # tasks until caches are full: tokenized datasets, samples of the trainer's costs
MAX_PYTHON_BYTES, MAX_MALLOC_BYTES = 800, 60_000  # a task, in every batch
MAX_MORE_FILES, MAX_MORE_THREADS = 12, 12  # a connection here, a pool's thread there
QUICK = {
    # Full when the warm-up ends, as the tokenizer's own cache of words is: what fills up looks like a leak.
    "alignment": {"MUXTUNE_TOKENIZED_CACHE_BYTES": "20000"},
    "execution": {
        "MUXTUNE_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MUXTUNE_CHECKPOINT_STEPS": "5",
        "MUXTUNE_CALIBRATION_SECONDS": "0.1",
    },
}


@dataclass(frozen=True)
class Count:
    """What a process holds: bytes of malloc and of Python's objects, open files, threads."""

    malloc_bytes: int
    bytes_by_type: Mapping[str, int]
    num_files: int
    num_threads: int

    @property
    def python_bytes(self) -> int:
        return sum(self.bytes_by_type.values())


def count(mesh: Mesh, folder: Path) -> dict[str, Count]:
    """Of each process. `folder`: where heap_census writes."""
    pids = {service: mesh.processes[service].pid for service in START_ORDER} | {TRAINER: trainer_of(mesh)}
    reports = {name: folder / f"{pid}.json" for name, pid in pids.items()}
    for name, pid in pids.items():
        reports[name].unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR2)
    until(lambda: all(report.exists() for report in reports.values()), lambda: f"a census of every process in {folder}")
    counts = {}
    for name, pid in pids.items():
        census = json.loads(reports[name].read_text())
        num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        num_threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        counts[name] = Count(census["malloc"], census["by_type"], num_files, num_threads)
    return counts


def settled(mesh: Mesh, folder: Path) -> dict[str, Count]:
    """Count until no process has become smaller since the count before: what ended tasks leave goes a moment after."""
    deadline, counts = time.monotonic() + END_SECONDS, count(mesh, folder)
    while True:
        time.sleep(SETTLE_POLL_SECONDS)
        before, counts = counts, count(mesh, folder)
        has_shrunk = [name for name in counts if counts[name].python_bytes < before[name].python_bytes - NOISE_BYTES]
        if not has_shrunk:
            return counts
        assert time.monotonic() < deadline, f"{has_shrunk} do not come to rest"


def growth(counts: Sequence[Mapping[str, Count]], num_tasks: int) -> list[str]:
    """What grew with every batch of `num_tasks` tasks, by process; `counts` are from before and after each batch.

    Of each type of Python's objects the smallest growth counts: a leak grows alike in all batches, and noise does not.
    """
    findings = []
    for name in counts[0]:
        of = [each[name] for each in counts]
        by_type = {
            kind: min(b.bytes_by_type.get(kind, 0) - a.bytes_by_type.get(kind, 0) for a, b in pairwise(of)) / num_tasks
            for kind in of[-1].bytes_by_type
        }
        python = sum(size for size in by_type.values() if size > 0)
        malloc = min(b.malloc_bytes - a.malloc_bytes for a, b in pairwise(of)) / num_tasks
        most = sorted(by_type.items(), key=lambda item: -item[1])[:8]
        print(f"{name}: a task {python:.0f} bytes of Python, {malloc:.0f} of malloc; {[each.num_files for each in of]}",
              f"files, {[each.num_threads for each in of]} threads; {most}")  # fmt: skip
        if python > MAX_PYTHON_BYTES:
            findings.append(f"{name}: objects of Python, {python:.0f} bytes a task; most of them {most}")
        if malloc > MAX_MALLOC_BYTES:
            findings.append(f"{name}: memory of malloc, {malloc:.0f} bytes a task")
        if of[-1].num_files > of[0].num_files + MAX_MORE_FILES:
            findings.append(f"{name}: open files")
        if of[-1].num_threads > of[0].num_threads + MAX_MORE_THREADS:
            findings.append(f"{name}: threads")
    return findings


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
        self._client, self._chance = client, chance
        self.states: list[int] = []

    def finish_tasks(self, number: int) -> None:
        """Returns when so many more have been created, and have ended."""
        names: list[str] = []
        while len(names) < number:
            self._act(names)
        self.states += [self._client.wait_task(name).state for name in names]

    def _act(self, names: list[str]) -> None:
        rows = [{"text": f"row {self._chance.randrange(1000)} of many"} for _ in range(self._chance.randint(1, 30))]
        dataset = self._client.upload_dataset(rows).name
        unfinished = [task.name for task in self._client.list_tasks() if task.state not in FINAL_STATES]
        if len(unfinished) < NUM_AT_ONCE:
            names.append(self._client.create_task(spec(dataset, self._chance)).name)
            next(self._client.watch_task(names[-1]))
        elif self._chance.random() < 0.5:
            with suppress(IllegalTransitionError):  # it ended meanwhile
                self._client.cancel_task(self._chance.choice(unfinished))
        else:
            self._client.delete_dataset(self._client.upload_dataset([*rows, *rows]).name)


def until(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + END_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what()}"
        time.sleep(POLL_SECONDS)


def checkpoints(store: Path) -> list[str]:
    """Folders of checkpoints that are not empty."""
    return [folder for folder, _, files in os.walk(store) if files and "/checkpoints/" in folder]


@pytest.mark.timeout(3600 if long_mode() else 600)
@pytest.mark.parametrize("num_tasks", [1000] if long_mode() else [pytest.param(120, marks=pytest.mark.thorough)])
def test_a_mesh_at_work_does_not_grow_and_leaves_nothing_behind(num_tasks: int, tmp_path: Path) -> None:
    chance = random.Random(printed_seed())
    backbone = write_backbone(tmp_path / "tiny")
    (folder := tmp_path / "census").mkdir()
    path = os.pathsep.join([str(CENSUS), os.environ.get("PYTHONPATH", str(CENSUS.parents[1]))])
    mesh = Mesh(
        tmp_path / "mesh",
        {"tiny": backbone},
        environment=QUICK | {"*": {"PYTHONPATH": path, "HEAP_CENSUS": str(folder)}},
    )
    with mesh, mesh.client() as client:
        tenant = Tenant(client, chance)
        tenant.finish_tasks(2)
        Chaos(mesh, chance).kill(TRAINER)  # the one that takes its place is judged
        until(lambda: trainer_of(mesh) != 0, lambda: "another trainer")
        tenant.finish_tasks(2)
        count(mesh, folder)  # makes some caches smaller
        tenant.finish_tasks(NUM_WARM_UP)
        counts = [settled(mesh, folder)]
        for _ in range(NUM_BATCHES):
            tenant.finish_tasks(num_tasks)
            counts.append(settled(mesh, folder))
        assert mesh.dead_services() == {}
        assert growth(counts, num_tasks) == []
        assert set(tenant.states) <= {task_pb2.TASK_STATE_SUCCEEDED, task_pb2.TASK_STATE_CANCELLED}
        print(f"{len(tenant.states)} tasks, {tenant.states.count(task_pb2.TASK_STATE_CANCELLED)} of them cancelled")
        # Had every task left a kilobyte behind, it would have been seen, in each of them.
        for batch in range(NUM_BATCHES):
            (folder / "planted").write_text(str((batch + 1) * num_tasks))
            counts.append(count(mesh, folder))
        findings = growth(counts[-NUM_BATCHES - 1 :], num_tasks)
        assert [line.partition(":")[0] for line in findings if "bytearray" in line] == [*START_ORDER, TRAINER]
        until_swept(mesh)


def until_swept(mesh: Mesh) -> None:
    """Checkpoints of ended tasks go a moment after; those of attempts that were still writing when admission starts."""
    store = mesh.data / "artifacts"
    until(lambda: len(checkpoints(store)) <= 2 * NUM_AT_ONCE, lambda: f"{checkpoints(store)} to go")
    mesh.processes["admission"].terminate()
    mesh.processes["admission"].wait(END_SECONDS)
    mesh.restart_service("admission")
    until(lambda: not checkpoints(store), lambda: f"{checkpoints(store)} to go")
