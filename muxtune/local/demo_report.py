"""The demo's tables: progress while its tasks train, then their losses, tokens and bytes. They fit into 80 columns."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from muxtune.task_states import FINAL_STATES, state_name
from muxtune.v1 import execution_pb2, task_pb2

_GIB = 1 << 30
_LINES_SECONDS = 5.0


@dataclass
class DemoTask:
    """A task of the demo, created at step `after_step` of the first task, and cancelled at its own `cancel_at`."""

    tenant: str
    id: str
    dataset: str
    lora: task_pb2.Lora
    training: task_pb2.Training
    prompt: str
    is_chat: bool = False
    after_step: int = 0
    cancel_at: int = 0
    task: task_pb2.Task = field(default_factory=task_pb2.Task)

    @property
    def name(self) -> str:
        return f"{self.tenant}/{self.id}"

    @property
    def is_over(self) -> bool:
        return self.task.state in FINAL_STATES


@contextmanager
def progress(console: Console) -> Iterator[Callable[[Sequence[DemoTask]], None]]:
    """Yields a function that shows the tasks: a live table on a terminal, else a line for each task that progressed."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            yield lambda tasks: live.update(progress_table(tasks))
        return
    shown: dict[str, str] = {}
    last_seconds = 0.0

    def print_lines(tasks: Sequence[DemoTask]) -> None:
        nonlocal last_seconds
        if time.monotonic() - last_seconds < _LINES_SECONDS and not all(task.is_over for task in tasks):
            return
        last_seconds = time.monotonic()
        for task in tasks:
            name, state, step, loss, rate, left = _progress_cells(task)
            cells = (name, state, step, loss, rate and f"{rate} tokens/s", left and f"{left} left")
            line = "  ".join(cell for cell in cells if cell)
            if shown.get(name) != line:
                console.print(line)
            shown[name] = line

    yield print_lines


def progress_table(tasks: Sequence[DemoTask]) -> Table:
    """Return the table of tasks with their steps, losses and speed."""
    return _table(
        "five tasks, one backbone",
        ("task", "state", "step", "loss", "tokens/s", "left"),
        map(_progress_cells, tasks),
    )


def result_table(tasks: Sequence[DemoTask], resident: execution_pb2.DescribeExecutorResponse) -> Table:
    """Return the table of results. `resident` is what the executor measured while most tasks trained."""
    rows = []
    for task in tasks:
        done, num_bytes = task.task.progress, resident.task_bytes.get(task.task.name, 0)
        padding = done.padding_tokens / max(1, done.padding_tokens + done.effective_tokens)
        rows.append(
            (
                task.name,
                state_name(task.task.state),
                _from_to(done.first_loss, done.last_loss),
                _from_to(done.first_heldout_loss, done.last_heldout_loss),
                str(done.effective_tokens),
                f"{padding:.1%}",
                f"{num_bytes / 1e6:.1f}" if num_bytes else "",
            )
        )
    return _table("results", ("task", "state", "loss", "held-out loss", "tokens", "pad", "MB"), rows)


def print_report(
    console: Console,
    tasks: Sequence[DemoTask],
    answers: Sequence[dict[str, object]],
    resident: execution_pb2.DescribeExecutorResponse,
    data: Path,
) -> None:
    """Print results, the memory that sharing saves, and each task's answers before and after training."""
    console.print(result_table(tasks, resident))
    console.print("Losses: first -> last. Tokens: without padding; pad: its share. MB: adapter and optimizer.")
    packed_bytes = resident.executor.backbone.packed_weight_bytes  # separate instances would not have them
    weights_bytes, tasks_bytes = resident.backbone_bytes - packed_bytes, sum(resident.task_bytes.values())
    num_tasks, shared_bytes = len(resident.task_bytes), weights_bytes + tasks_bytes
    separate_bytes = weights_bytes * num_tasks + tasks_bytes
    console.print(
        f"Weights, adapters and optimizers of the {num_tasks} tasks that trained at once: "
        f"{shared_bytes / _GIB:.2f} GiB measured. Separate instances would hold {separate_bytes / _GIB:.2f} GiB "
        f"({separate_bytes / max(1, shared_bytes):.1f} times)."
    )
    if packed_bytes:
        console.print(
            f"Beside them {packed_bytes / _GIB:.2f} GiB of weights are packed for this CPU, for speed; "
            "MUXTUNE_PACK_WEIGHTS=false turns this off."
        )
    for task, answer in zip(tasks, answers, strict=False):
        console.print(f"\n{task.name}: {task.prompt!r}")
        console.print(f"  before: {answer['before']}")
        console.print(f"  after:  {answer['after']}")
    console.print(f"\nadapters: {data / 'adapters'}   trace: {data / 'traces' / 'spans.jsonl'}   logs: {data / 'logs'}")


def _progress_cells(task: DemoTask) -> tuple[str, str, str, str, str, str]:
    done = task.task.progress
    return (
        task.name,
        state_name(task.task.state) if task.task.name else "not created yet",
        f"{done.step}/{done.num_steps}",
        f"{done.last_loss:.3f}" if done.HasField("last_loss") else "",
        f"{done.effective_tokens_per_second:.0f}" if done.step else "",
        f"{done.seconds_left:.0f} s" if done.HasField("seconds_left") else "",
    )


def _from_to(first: float, last: float) -> str:
    """Return "2.31 -> 1.20", or one number if the two are equal."""
    return f"{first:.2f} -> {last:.2f}" if last != first else f"{first:.2f}"


def _table(title: str, columns: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Table:
    """Return a table without vertical lines: they would take a quarter of 80 columns."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
