"""The demo's tables at 80 columns: no value is cut, even the longest."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from muxtune.local.demo import demo_tasks
from muxtune.local.demo_report import DemoTask, progress_table, result_table
from muxtune.task_states import state_name
from muxtune.v1 import execution_pb2, task_pb2


@pytest.fixture
def tasks() -> list[DemoTask]:
    tasks = demo_tasks()
    for task in tasks:
        task.task.name = f"tenants/{task.tenant}/tasks/{task.id}"
        task.task.state = task_pb2.TASK_STATE_CANCELLED if task.cancel_at else task_pb2.TASK_STATE_SUCCEEDED
        task.task.progress.CopyFrom(
            task_pb2.TaskProgress(
                step=188, num_steps=200, first_loss=14.67, last_loss=10.25, first_heldout_loss=13.99,
                last_heldout_loss=11.05, effective_tokens=123_456, padding_tokens=1_000_000, seconds_left=1234,
                effective_tokens_per_second=12_345,
            )
        )  # fmt: skip
    return tasks


def rendered(table: Table) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    assert "…" not in out.getvalue()
    return out.getvalue().splitlines()


def row_of(task: DemoTask, lines: list[str]) -> str:
    (line,) = (line for line in lines if line.split()[:1] == [task.name])
    return line


def test_results_are_whole(tasks: list[DemoTask]) -> None:
    resident = execution_pb2.DescribeExecutorResponse(task_bytes={task.task.name: 234_500_000 for task in tasks})
    lines = rendered(result_table(tasks, resident))
    assert ["task", "state", "loss", "held-out", "loss", "tokens", "pad", "MB"] in [line.split() for line in lines]
    for task in tasks:
        cells = [task.name, state_name(task.task.state), "14.67", "->", "10.25", "13.99", "->", "11.05", "123456",
                 "89.0%", "234.5"]  # fmt: skip
        assert row_of(task, lines).split() == cells


def test_progress_is_whole(tasks: list[DemoTask]) -> None:
    tasks[0].task.state = task_pb2.TASK_STATE_CANCELLING
    tasks[1].task.ClearField("name")
    lines = rendered(progress_table(tasks))
    for task in tasks:
        state = state_name(task.task.state) if task.task.name else "not created yet"
        cells = [task.name, *state.split(), "188/200", "10.250", "12345", "1234", "s"]
        assert row_of(task, lines).split() == cells
