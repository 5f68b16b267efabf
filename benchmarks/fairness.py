"""Shares of device time of two tenants on a running mesh: one small task beside a tenant of each kind of appetite.

    python benchmarks/fairness.py [--seconds 20] [--case NAME ...] [--json FILE]

The honest tenant trains one small task without end. Its steps a second are measured alone, then beside each other
tenant, then alone again; half of them is its fair share. Beside it stand what both tenants were charged, and how soon a
new task of the honest tenant takes its first step and a cancelled task of the other tenant ends.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from muxtune.client import Client
from muxtune.local.mesh import Mesh
from muxtune.task_states import FINAL_STATES
from muxtune.v1 import task_pb2
from tests.tiny_backbone import write_backbone

_FOREVER = 1_000_000  # steps
_SETTLE_SECONDS = 4.0  # after a plan has changed, before rates are measured


@dataclass(frozen=True)
class Share:
    """The share of an honest tenant. `fraction`: its steps a second beside another over those alone; fair is 0.5."""

    case: str
    alone_steps_per_second: float
    steps_per_second: float
    fraction: float
    charged_share: float
    first_step_seconds: float
    cancel_seconds: float


@dataclass(frozen=True)
class Case:
    """The tasks of a tenant with an appetite."""

    num_tasks: int
    num_rows: int
    words: int
    training: dict[str, float]

    def create(self, client: Client) -> list[str]:
        rows = [{"text": f"{i} " + "a row of many words " * self.words} for i in range(self.num_rows)]
        dataset = client.upload_dataset(rows).name
        return [client.create_task(_spec(dataset, seed=i, **self.training)).name for i in range(self.num_tasks)]


CASES = {
    "60 like tasks": Case(60, 200, 2, {}),
    "one step of 16384 rows": Case(1, 20_000, 6, {"global_batch_size": 16384}),
    "evaluates 9000 rows after each step": Case(1, 10_000, 2, {"heldout_fraction": 0.9, "evaluate_every_steps": 1}),
    "verifies each step of 4096 rows": Case(1, 5_000, 6, {"global_batch_size": 4096, "verify_every_steps": 1}),
    "one like task": Case(1, 200, 2, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="time over which a rate is measured")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with running_mesh() as mesh:
        shares = [measure(mesh, name, arguments.seconds) for name in arguments.case or CASES]
    for share in shares:
        print(json.dumps(asdict(share)), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(share) for share in shares], indent=1) + "\n")


@contextmanager
def running_mesh() -> Iterator[Mesh]:
    """Run a mesh with a backbone so large that microbatches take most of the time."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        backbone = write_backbone(folder / "backbone", hidden_size=96, intermediate_size=256, num_hidden_layers=4)
        environment = {"execution": {"MUXTUNE_NUM_THREADS": "1"}}
        yield stack.enter_context(Mesh(folder / "mesh", {"tiny": backbone}, environment=environment))


def measure(mesh: Mesh, case: str, seconds: float) -> Share:
    """Measure the honest tenant's steps alone, beside the case's tenant, and alone again."""
    good, bad = (mesh.client(mesh.create_key(f"tenants/{name}")) for name in ("good", "bad"))
    with good, bad:
        dataset = good.upload_dataset([{"text": f"{i} a row of some words to learn from"} for i in range(64)]).name
        task = good.create_task(_spec(dataset)).name
        _wait_for_step(good, task)
        alone = [_rate(good, task, seconds / 2)]
        others = CASES[case].create(bad)
        _wait_for_all_running(bad, others)
        time.sleep(_SETTLE_SECONDS)
        before = [_device_seconds(good, [task]), _device_seconds(bad, others)]
        rate = _rate(good, task, seconds)
        used = [_device_seconds(good, [task]) - before[0], _device_seconds(bad, others) - before[1]]
        started = time.monotonic()
        second = good.create_task(_spec(dataset, seed=1)).name
        _wait_for_step(good, second)
        first_step_seconds = time.monotonic() - started
        good.cancel_task(second)
        started = time.monotonic()
        for name in others:
            bad.cancel_task(name)
        _until(lambda: bad.get_task(others[0]).state in FINAL_STATES)
        cancel_seconds = time.monotonic() - started
        _until(lambda: all(bad.get_task(name).state in FINAL_STATES for name in others))
        alone.append(_rate(good, task, seconds / 2))
        good.cancel_task(task)
        _until(lambda: good.get_task(task).state in FINAL_STATES)
    mean = statistics.fmean(alone)
    return Share(case, mean, rate, rate / mean, used[0] / max(1e-9, sum(used)), first_step_seconds, cancel_seconds)


def _spec(dataset: str, **training: float) -> task_pb2.TaskSpec:
    values = {"learning_rate": 1e-4, "num_steps": _FOREVER, "max_sequence_tokens": 128, "micro_batch_size": 8}
    return task_pb2.TaskSpec(
        backbone="tiny", dataset=dataset, lora=task_pb2.Lora(rank=4, alpha=8, target_modules=["q_proj"]),
        training=task_pb2.Training(**(values | training)),
    )  # fmt: skip


def _rate(client: Client, task: str, seconds: float) -> float:
    """Return steps a second over about `seconds`, by the steps and times of committed progress."""
    first, started = client.get_task(task).progress.step, time.monotonic()
    time.sleep(seconds)
    last = client.get_task(task).progress.step
    return (last - first) / (time.monotonic() - started)


def _device_seconds(client: Client, tasks: Sequence[str]) -> float:
    return sum(client.get_task(task).progress.device_seconds for task in tasks)


def _wait_for_step(client: Client, task: str) -> None:
    _until(lambda: client.get_task(task).progress.step > 0)


def _wait_for_all_running(client: Client, tasks: Sequence[str]) -> None:
    _until(lambda: all(client.get_task(task).state == task_pb2.TASK_STATE_RUNNING for task in tasks))


def _until(condition: Callable[[], bool], timeout_seconds: float = 300.0) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("a task did not get there within five minutes")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
