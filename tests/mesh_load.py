"""The load of tenants on a mesh while its processes are killed: different tasks, watched to their ends."""

import functools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file

from muxtune.client import Client
from muxtune.errors import IllegalTransitionError, UnavailableError
from muxtune.task_states import FINAL_STATES
from muxtune.v1 import event_pb2, task_pb2

NUM_STEPS, NUM_AT_ONCE = 40, 3
END_SECONDS = 120.0
ROWS = [{"prompt": f"what is {i} and {i}", "completion": " it is more" * (1 + i % 5)} for i in range(24)]
T = TypeVar("T")


def specs(dataset: str) -> list[task_pb2.TaskSpec]:
    """Return tasks that differ in rank, batch, dropout, targets and schedule. One is evaluated during training."""
    common = {"num_steps": NUM_STEPS, "max_sequence_tokens": 64}
    modules = ["q_proj", "down_proj"]
    variants = [
        (task_pb2.Lora(rank=4, alpha=8, dropout=0.1, target_modules=modules),
         {"learning_rate": 0.01, "global_batch_size": 4, "seed": 3}),
        (task_pb2.Lora(rank=8, alpha=8, dropout=0.3, target_modules=["all-linear"]),
         {"learning_rate": 0.005, "global_batch_size": 6, "micro_batch_size": 2, "warmup_steps": 5, "seed": 5,
          "heldout_fraction": 0.2, "evaluate_every_steps": 7}),
        (task_pb2.Lora(rank=2, alpha=4, target_modules=modules),
         {"learning_rate": 0.05, "optimizer": task_pb2.OPTIMIZER_SGD, "momentum": 0.9, "global_batch_size": 3}),
    ]  # fmt: skip
    return [
        task_pb2.TaskSpec(backbone="tiny", dataset=dataset, lora=lora, training=task_pb2.Training(**common, **fields))
        for lora, fields in variants
    ]


@dataclass
class Outcome:
    """The outcome of a task: all its events as they were watched, and its adapter."""

    task: task_pb2.Task
    events: list[event_pb2.TaskEvent]
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)

    def of(self, kind: str) -> list[event_pb2.StepDone]:
        return [getattr(event, kind) for event in self.events if event.WhichOneof("event") == kind]


class Patience:
    """Repeats a call until it succeeds: services can be down longer than the client retries. `give_up` ends this."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def __call__(self, call: Callable[[], T]) -> T:
        while True:
            try:
                return call()
            except UnavailableError:
                if self._is_over.wait(0.2):
                    raise

    def give_up(self) -> None:
        self._is_over.set()


def outcome(client: Client, name: str, folder: Path, patiently: Patience) -> Outcome:
    """Watch the task to its end, with a new watch after every failure."""
    events: list[event_pb2.TaskEvent] = []

    def watch() -> None:
        events.extend(client.watch_task(name, events[-1].sequence if events else 0))

    patiently(watch)
    result = Outcome(patiently(lambda: client.get_task(name)), events)
    if result.task.adapter:
        dest = folder / name.replace("/", "-")
        patiently(lambda: client.download_adapter(name, dest))
        result.adapter = load_file(dest / "adapter_model.safetensors")
    return result


class Load:
    """Acts as tenants: keeps a few tasks unfinished, uploads, sometimes cancels, and records what was acknowledged."""

    def __init__(self, client: Client, chance: random.Random, folder: Path) -> None:
        self._client, self._chance, self._folder = client, chance, folder
        self._pool, self._patiently = ThreadPoolExecutor(64), Patience()
        self.datasets: dict[str, str] = {}
        self.tasks: dict[str, tuple[int, Future[Outcome]]] = {}  # number of its spec
        self.cancelled: set[str] = set()

    def begin(self) -> None:
        """Upload one dataset, and create tasks until NUM_AT_ONCE are unfinished."""
        rows = [{"text": f"row {self._chance.random()}"} for _ in range(3)]
        request = f"upload-{len(self.datasets)}"
        stored = self._patiently(lambda: self._client.upload_dataset(rows, request_id=request))
        self.datasets[stored.name] = stored.sha256
        while sum(not watching.done() for _, watching in self.tasks.values()) < NUM_AT_ONCE:
            self._create()

    def _create(self) -> None:
        number, request = len(self.tasks) % 3, f"task-{len(self.tasks)}"
        spec = specs("tenants/default/datasets/rows")[number]
        task = self._patiently(lambda: self._client.create_task(spec, request_id=request))
        assert task.name not in self.tasks, "one task for two requests"
        watching = self._pool.submit(outcome, self._client, task.name, self._folder, self._patiently)
        self.tasks[task.name] = number, watching
        if self._chance.random() < 0.2:
            with suppress(IllegalTransitionError):  # it has ended meanwhile
                self._patiently(lambda: self._client.cancel_task(task.name))
                self.cancelled.add(task.name)

    def until_each_has_done_a_step(self) -> None:
        """Wait until every unfinished task has done a further step, or ended."""
        for task in self._patiently(lambda: list(self._client.list_tasks())):
            if task.state not in FINAL_STATES:
                self._patiently(functools.partial(self._until_past, task.name, task.progress.step))

    def _until_past(self, name: str, step: int) -> None:
        for event in self._client.watch_task(name):
            if event.step_done.step > step:
                return

    def end(self) -> list[tuple[int, Outcome]]:
        """Wait for the end of all tasks."""
        deadline = time.monotonic() + END_SECONDS
        try:
            return [(number, watching.result(deadline - time.monotonic())) for number, watching in self.tasks.values()]
        except TimeoutError:
            unfinished = [str(task) for task in self._client.list_tasks() if task.state not in FINAL_STATES]
            pytest.fail(f"never ended: {unfinished}")
        finally:
            self._patiently.give_up()
            self._pool.shutdown(wait=False, cancel_futures=True)
