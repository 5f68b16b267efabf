"""`muxtune demo`: trains five tasks of three tenants on one backbone, then compares answers before and after.

One task arrives while the others train, one is cancelled midway. Answers come from the downloaded adapters in plain
peft. The demo succeeds if every task ended as it should, the held-out loss of those that trained to their end fell, and
each adapter changes the backbone's logits.
"""

import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

from rich.console import Console

from muxtune.child_process import child_command
from muxtune.client import Client
from muxtune.errors import raising
from muxtune.local.demo_report import DemoTask, print_report, progress
from muxtune.local.mesh import DEFAULT_BACKBONE, Mesh, default_backbone
from muxtune.local.tracing import traced
from muxtune.resource_names import tenant_name
from muxtune.task_states import state_name
from muxtune.v1 import execution_pb2, execution_pb2_grpc, task_pb2

EXAMPLES = Path(__file__).parents[2] / "examples"


def demo_tasks() -> list[DemoTask]:
    """Return tasks of ranks 4 to 32 with different targets, learning rates, batches and lengths."""
    ticket = "Ticket: the parcel with a bike lamp is late.\nQueue:"
    question = "Hello, the courier left a rain cape in the rain. What now?"
    note = "Fernwood firmware 6.1\n\nWhat is new:\n"

    def training(rate: float, steps: int, batch: int, max_tokens: int, **more: float) -> task_pb2.Training:
        return task_pb2.Training(
            learning_rate=rate,
            num_steps=steps,
            global_batch_size=batch,
            micro_batch_size=4,
            max_sequence_tokens=max_tokens,
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


def run_demo(data: Path, console: Console) -> bool:
    """Run the demo on a fresh data folder. Returns whether it succeeded."""
    started = time.monotonic()
    if data.exists() and not (data / "mesh.json").exists() and (not data.is_dir() or any(data.iterdir())):
        console.print(f"{data} is not the folder of a demo: choose another one with --data")
        return False
    _remove_last_run(data)
    console.print("starting four services and preparing the backbone SmolLM2-135M-Instruct ...")
    with Mesh(data, {DEFAULT_BACKBONE: default_backbone()}) as mesh, traced(data):
        clients = {tenant: mesh.client(mesh.create_key(tenant_name(tenant)))
                   for tenant in ("harbour", "meadow", "quarry")}  # fmt: skip
        for service, address in mesh.addresses.items():
            console.print(f"  {service:<11} {address}")
        tasks = demo_tasks()
        resident = _train(mesh, clients, tasks, console)
        console.print(f"trained in {time.monotonic() - started:.0f} s since the start; asking the adapters ...")
        for task in tasks:
            clients[task.tenant].download_adapter(task.task.name, data / "adapters" / task.id)
        answers = _answers(mesh, data, tasks, console)
        for client in clients.values():
            client.close()
    problems = _problems(tasks, answers)
    print_report(console, tasks, answers, resident, data)
    for problem in problems:
        console.print(f"error: {problem}", style="red")
    console.print(f"{'failed' if problems else 'done'} in {time.monotonic() - started:.0f} s")
    return not problems


def _remove_last_run(data: Path) -> None:
    """Remove everything but the prepared backbone, which takes a while to make."""
    for path in data.iterdir() if data.exists() else ():
        if path.name != "backbones":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _train(
    mesh: Mesh, clients: dict[str, Client], tasks: list[DemoTask], console: Console
) -> execution_pb2.DescribeExecutorResponse:
    """Create, follow and cancel the tasks. Returns what the executor measured while most of them trained."""
    uploaded: dict[tuple[str, str], str] = {}
    waiting = list(tasks)
    described = execution_pb2.DescribeExecutorResponse()
    with progress(console) as show:
        while True:
            first_step = tasks[0].task.progress.step
            for task in [task for task in waiting if first_step >= task.after_step]:
                waiting.remove(task)
                _create(clients[task.tenant], task, uploaded)
            for task in tasks:
                if task.task.name:
                    _follow(clients[task.tenant], task)
            now = _describe(mesh)
            described = now if len(now.tasks) >= len(described.tasks) else described
            show(tasks)
            if not waiting and all(task.is_over for task in tasks):
                return described
            threading.Event().wait(0.5)


def _create(client: Client, task: DemoTask, uploaded: dict[tuple[str, str], str]) -> None:
    key = (task.tenant, task.dataset)
    if key not in uploaded:
        uploaded[key] = client.upload_dataset(EXAMPLES / f"{task.dataset}.jsonl", task.dataset.replace("_", "-")).name
    spec = task_pb2.TaskSpec(
        backbone=DEFAULT_BACKBONE,
        lora=task.lora,
        dataset=uploaded[key],
        training=task.training,
        labels={"demo": "yes"},
    )
    task.task = client.create_task(spec, task.id)


def _follow(client: Client, task: DemoTask) -> None:
    if not task.is_over:
        task.task = client.get_task(task.task.name)
    is_running = task.task.state == task_pb2.TASK_STATE_RUNNING
    if task.cancel_at and is_running and task.task.progress.step >= task.cancel_at:
        task.task = client.cancel_task(task.task.name)


def _describe(mesh: Mesh) -> execution_pb2.DescribeExecutorResponse:
    with mesh.operator_channel("execution") as channel, raising():
        stub = execution_pb2_grpc.ExecutionServiceStub(channel)
        return stub.DescribeExecutor(execution_pb2.DescribeExecutorRequest(), timeout=30)


def _answers(mesh: Mesh, data: Path, tasks: list[DemoTask], console: Console) -> list[dict[str, object]]:
    """Return each adapter's answers, one dict a task; see `muxtune.local.demo_answers`."""
    request = {
        "backbone": str(mesh.backbone_folder(DEFAULT_BACKBONE)),
        "jobs": [
            {"adapter": str(data / "adapters" / task.id), "prompt": task.prompt, "is_chat": task.is_chat}
            for task in tasks
        ],
    }
    path = data / "answers.json"
    path.write_text(json.dumps(request))
    command = child_command("muxtune.local.demo_answers", str(path))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _problems(tasks: list[DemoTask], answers: list[dict[str, object]]) -> list[str]:
    """Return a line for everything that did not end as it should."""
    problems = []
    for task in tasks:
        wanted, done = task_pb2.TASK_STATE_CANCELLED if task.cancel_at else task_pb2.TASK_STATE_SUCCEEDED, task.task
        if done.state != wanted:
            problems.append(f"{task.id} is {state_name(done.state)}: {done.failure.message}")
        elif task.cancel_at and done.progress.step < task.cancel_at:
            problems.append(f"{task.id} was cancelled at step {task.cancel_at}, but is at step {done.progress.step}")
        elif not task.cancel_at and not done.progress.last_heldout_loss < done.progress.first_heldout_loss:
            problems.append(f"the held-out loss of {task.id} did not fall")
    if len(answers) != len(tasks):
        problems.append(f"{len(answers)} of {len(tasks)} adapters answered in plain peft")
    problems += [
        f"the adapter of {task.id} does not change the backbone's logits"
        for task, answer in zip(tasks, answers, strict=False)
        if not float(str(answer["max_logit_change"])) > 0
    ]
    return problems
