"""`muxtune demo`: five tasks of three tenants on one backbone, live, then what came of them.

One task arrives while the others train, one is cancelled midway. Answers come from the downloaded adapters in plain
peft. True only if every task ended as it should, the held-out loss of those that trained to their end fell, and each
adapter changes the backbone's logits.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.live import Live
from rich.table import Table

from muxtune.cli.context import console
from muxtune.cli.task import state_name
from muxtune.cli.tracing import traced
from muxtune.client import Client
from muxtune.errors import raising
from muxtune.local.mesh import DEFAULT_BACKBONE, Mesh, default_backbone
from muxtune.v1 import execution_pb2, execution_pb2_grpc, task_pb2

EXAMPLES = Path(__file__).parents[2] / "examples"
_GIB = 1 << 30
_LINES_SECONDS = 5.0


@dataclass
class DemoTask:
    """One task of the demo. `after_step` of the first job starts a late one; `cancel_at` cancels it there."""

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


def jobs() -> list[DemoTask]:
    """Ranks 4 to 32, different targets, rates, batches and lengths."""
    ticket = "Ticket: the parcel with a bike lamp is late.\nQueue:"
    question = "Hello, the courier left a rain cape in the rain. What now?"
    note = "Fernwood firmware 6.1\n\nWhat is new:\n"

    def training(rate: float, steps: int, batch: int, longest: int, **more: float) -> task_pb2.Training:
        return task_pb2.Training(
            learning_rate=rate,
            num_steps=steps,
            global_batch_size=batch,
            micro_batch_size=4,
            max_sequence_tokens=longest,
            warmup_steps=2,
            heldout_fraction=0.1,
            seed=1,
            **more,  # type: ignore[arg-type]
        )

    def lora(rank: int, *targets: str) -> task_pb2.Lora:
        return task_pb2.Lora(rank=rank, alpha=2 * rank, target_modules=targets)

    return [
        DemoTask("harbour", "labels", "ticket_labels", lora(4, "q_proj", "v_proj"), training(3e-3, 24, 4, 32), ticket),
        DemoTask("harbour", "replies", "support_replies", lora(16, "q_proj", "k_proj", "v_proj", "o_proj"),
            training(2e-3, 16, 4, 128), question, is_chat=True),
        DemoTask("meadow", "notes", "release_notes", lora(32, "all-linear"), training(1e-3, 10, 2, 192), note),
        DemoTask("meadow", "stopped", "release_notes", lora(8, "down_proj"), training(1e-3, 200, 2, 128), note,
        cancel_at=6), DemoTask("quarry", "late", "support_replies", lora(8, "gate_proj", "up_proj", "down_proj"),
            training(2e-3, 12, 2, 96), question, is_chat=True, after_step=4),
    ]  # fmt: skip


def run_demo(data: Path) -> bool:
    """Runs it all on a fresh data folder; whether everything ended as it should."""
    started = time.monotonic()
    if data.exists() and not (data / "mesh.json").exists() and any(data.iterdir()):
        console.print(f"{data} is not a demo's folder: choose another with --data")
        return False
    _forget_last_time(data)
    console.print("starting four services, preparing the backbone SmolLM2-135M-Instruct ...")
    with Mesh(data, {DEFAULT_BACKBONE: default_backbone()}) as mesh, traced(data):
        clients = {tenant: mesh.client(mesh.create_key(f"tenants/{tenant}"))
                   for tenant in ("harbour", "meadow", "quarry")}  # fmt: skip
        for service, address in mesh.addresses.items():
            console.print(f"  {service:<11} {address}")
        work = jobs()
        resident = _train(mesh, clients, work)
        console.print(f"trained in {time.monotonic() - started:.0f} s since the start; asking the adapters ...")
        for job in work:
            clients[job.tenant].download_adapter(job.task.name, data / "adapters" / job.id)
        answers = _answers(mesh, data, work)
        for client in clients.values():
            client.close()
    problems = _problems(work, answers)
    _report(work, answers, resident, data)
    for problem in problems:
        console.print(f"error: {problem}", style="red")
    console.print(f"{'failed' if problems else 'done'} in {time.monotonic() - started:.0f} s")
    return not problems


def _forget_last_time(data: Path) -> None:
    """All but the prepared backbone, which takes a while to make."""
    for path in data.iterdir() if data.exists() else ():
        if path.name != "backbones":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _train(mesh: Mesh, clients: dict[str, Client], work: list[DemoTask]) -> execution_pb2.DescribeExecutorResponse:
    """Creates, follows and cancels tasks; what the executor measured while most were resident."""
    uploaded: dict[tuple[str, str], str] = {}
    waiting = list(work)
    described = execution_pb2.DescribeExecutorResponse()
    with _progress() as show:
        while True:
            first_step = work[0].task.progress.step
            for job in [job for job in waiting if first_step >= job.after_step]:
                waiting.remove(job)
                _create(clients[job.tenant], job, uploaded)
            for job in work:
                if job.task.name:
                    _follow(clients[job.tenant], job)
            now = _describe(mesh)
            described = now if len(now.tasks) >= len(described.tasks) else described
            show(work)
            if not waiting and all(_is_over(job) for job in work):
                return described
            threading.Event().wait(0.5)


def _create(client: Client, job: DemoTask, uploaded: dict[tuple[str, str], str]) -> None:
    key = (job.tenant, job.dataset)
    if key not in uploaded:
        uploaded[key] = client.upload_dataset(EXAMPLES / f"{job.dataset}.jsonl", job.dataset.replace("_", "-")).name
    spec = task_pb2.TaskSpec(
        backbone=DEFAULT_BACKBONE, lora=job.lora, dataset=uploaded[key], training=job.training, labels={"demo": "yes"}
    )
    job.task = client.create_task(spec, job.id)


def _follow(client: Client, job: DemoTask) -> None:
    if not _is_over(job):
        job.task = client.get_task(job.task.name)
    is_running = job.task.state == task_pb2.TASK_STATE_RUNNING
    if job.cancel_at and is_running and job.task.progress.step >= job.cancel_at:
        job.task = client.cancel_task(job.task.name)


def _describe(mesh: Mesh) -> execution_pb2.DescribeExecutorResponse:
    with mesh.operator_channel("execution") as channel, raising():
        stub = execution_pb2_grpc.ExecutionServiceStub(channel)
        request = execution_pb2.DescribeExecutorRequest()
        return stub.DescribeExecutor(request, timeout=30)


def _is_over(job: DemoTask) -> bool:
    return job.task.state in (
        task_pb2.TASK_STATE_SUCCEEDED,
        task_pb2.TASK_STATE_FAILED,
        task_pb2.TASK_STATE_CANCELLED,
    )


def _answers(mesh: Mesh, data: Path, work: list[DemoTask]) -> list[dict[str, object]]:
    request = {
        "backbone": str(mesh.backbone_folder(DEFAULT_BACKBONE)),
        "jobs": [
            {"adapter": str(data / "adapters" / job.id), "prompt": job.prompt, "is_chat": job.is_chat} for job in work
        ],
    }
    path = data / "answers.json"
    path.write_text(json.dumps(request))
    command = [sys.executable, "-m", "muxtune.local.demo_answers", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@contextmanager
def _progress() -> Iterator[Callable[[list[DemoTask]], None]]:
    """A table that lives on a terminal; elsewhere a line for each task that moved, every few seconds."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            yield lambda work: live.update(_progress_table(work))
        return
    told: dict[str, str] = {}
    last = [0.0]

    def print_lines(work: list[DemoTask]) -> None:
        if time.monotonic() - last[0] < _LINES_SECONDS and not all(map(_is_over, work)):
            return
        last[0] = time.monotonic()
        for job in work:
            line = "  ".join(cell for cell in _progress_cells(job) if cell)
            if told.get(job.id) != line:
                console.print(line)
            told[job.id] = line

    yield print_lines


def _progress_cells(job: DemoTask) -> tuple[str, ...]:
    progress = job.task.progress
    return (
        f"{job.tenant}/{job.id}",
        state_name(job.task.state) if job.task.name else "not created yet",
        f"{progress.step}/{progress.num_steps}",
        f"{progress.last_loss:.3f}" if progress.HasField("last_loss") else "",
        f"{progress.effective_tokens_per_second:.0f} tokens/s" if progress.step else "",
        f"{progress.seconds_left:.0f} s left" if progress.HasField("seconds_left") else "",
    )


def _progress_table(work: list[DemoTask]) -> Table:
    table = Table(title="five tasks, one backbone", title_justify="left")
    for column in ("task", "state", "step", "loss", "effective", "left"):
        table.add_column(column, no_wrap=True)
    for job in work:
        table.add_row(*_progress_cells(job))
    return table


def _report(
    work: list[DemoTask],
    answers: list[dict[str, object]],
    resident: execution_pb2.DescribeExecutorResponse,
    data: Path,
) -> None:
    table = Table(title="what came of it", title_justify="left")
    for column in ("task", "state", "loss", "held-out", "tokens", "padding", "bytes"):
        table.add_column(column, no_wrap=True)
    for job in work:
        progress, size = job.task.progress, resident.task_bytes.get(job.task.name, 0)
        padding = progress.padding_tokens / max(1, progress.padding_tokens + progress.effective_tokens)
        table.add_row(
            f"{job.tenant}/{job.id}",
            state_name(job.task.state),
            _from_to(progress.first_loss, progress.last_loss),
            _from_to(progress.first_heldout_loss, progress.last_heldout_loss),
            str(progress.effective_tokens),
            f"{padding:.1%}",
            f"{size / 1e6:.1f} MB" if size else "",
        )
    console.print(table)
    console.print("Losses from and to; tokens are effective ones; bytes are of adapter and optimizer, measured.")
    packed = resident.executor.backbone.packed_weight_bytes  # no instance of others has them: told apart
    weights, of_tasks = resident.backbone_bytes - packed, sum(resident.task_bytes.values())
    shared, separate = weights + of_tasks, weights * len(resident.task_bytes) + of_tasks
    console.print(
        f"Weights, adapters and optimizers of the {len(resident.task_bytes)} tasks resident at once: "
        f"{shared / _GIB:.2f} GiB measured; as separate instances the same would hold {separate / _GIB:.2f} GiB "
        f"({separate / max(1, shared):.1f} times)."
    )
    if packed:
        console.print(
            f"Beside them {packed / _GIB:.2f} GiB of weights are packed for this CPU: faster rounds for bytes, "
            "MUXTUNE_PACK_WEIGHTS=false does without."
        )
    for job, answer in zip(work, answers, strict=False):
        console.print(f"\n{job.tenant}/{job.id}: {job.prompt!r}")
        console.print(f"  before: {answer['before']}")
        console.print(f"  after:  {answer['after']}")
    console.print(f"\nadapters: {data / 'adapters'}   trace: {data / 'traces' / 'spans.jsonl'}   logs: {data / 'logs'}")


def _from_to(first: float, last: float) -> str:
    """One figure where there was no second."""
    return f"{first:.2f} -> {last:.2f}" if last != first else f"{first:.2f}"


def _problems(work: list[DemoTask], answers: list[dict[str, object]]) -> list[str]:
    found = []
    for job in work:
        wanted = task_pb2.TASK_STATE_CANCELLED if job.cancel_at else task_pb2.TASK_STATE_SUCCEEDED
        if job.task.state != wanted:
            found.append(f"{job.id} is {state_name(job.task.state)}: {job.task.failure.message}")
        elif job.cancel_at and job.task.progress.step < job.cancel_at:
            found.append(f"{job.id} was cancelled at step {job.cancel_at}, but has only {job.task.progress.step}")
        elif not job.cancel_at and not job.task.progress.last_heldout_loss < job.task.progress.first_heldout_loss:
            found.append(f"the held-out loss of {job.id} did not fall")
    if len(answers) != len(work):
        found.append(f"{len(answers)} of {len(work)} adapters answered in plain peft")
    found += [
        f"the adapter of {job.id} changes nothing"
        for job, answer in zip(work, answers, strict=False)
        if not float(str(answer["max_logit_change"])) > 0
    ]
    return found
