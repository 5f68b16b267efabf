"""`muxtune task`: creates, lists, shows, watches and cancels tasks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, IdOption, JsonOption, open_client
from muxtune.cli.dataset import warn_of_special_text
from muxtune.cli.spec import read_settings, read_spec
from muxtune.cli.terminal import console, print_json, table
from muxtune.cli.training_options import with_training_options
from muxtune.task_states import state_name
from muxtune.v1 import event_pb2, task_pb2

app = typer.Typer(help="Create, list, get, watch and cancel fine-tuning tasks.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(help="tenants/TENANT/tasks/ID")]


@app.command(
    epilog="Examples: muxtune task create -f examples/replies.yaml   |   muxtune task create --dataset "
    "tenants/default/datasets/replies --rank 8 --target q_proj --target v_proj --learning-rate 1e-3 --epochs 2"
)
@with_training_options
def create(
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Spec of the task as YAML; flags override it.")
    ] = None,
    id: IdOption = "",
    backbone: Annotated[str | None, typer.Option(help="Name of the backbone; default: smollm2.")] = None,
    dataset: Annotated[str | None, typer.Option(help="tenants/TENANT/datasets/ID")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; default: the rank.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Target module of LoRA; repeat the option for several.")
    ] = None,
    training: Annotated[dict[str, Any] | None, "one option for each field"] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other field, as in labels.team=support.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Check and estimate the task without creating it.")] = False,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Create a task from a YAML file, from flags, or from both."""
    flags = {
        "backbone": backbone if backbone or file else "smollm2",
        "dataset": dataset,
        "lora.rank": rank,
        "lora.alpha": alpha,
        "lora.dropout": dropout,
        "lora.target_modules": target or None,
        **{f"training.{name}": value for name, value in (training or {}).items()},
    }
    with open_client(data) as client:
        set_flags = {path: value for path, value in flags.items() if value is not None}
        spec = read_spec(file, set_flags | read_settings(set_ or []))
        if dry_run:
            return _print_estimate(client.estimate_task(spec), json)
        task = client.create_task(spec, id)
        if json:
            return print_json([task])
        console.print(task.name)
        _print_estimate(task.estimate, False)


@app.command("list", epilog="Example: muxtune task list --state RUNNING --state QUEUED --json")
@app.command("ls", hidden=True)
def list_(
    state: Annotated[
        list[str] | None, typer.Option(help="List only tasks in this state (QUEUED, RUNNING, ...); may be repeated.")
    ] = None,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """List tasks, newest first."""
    with open_client(data) as client:
        tasks = list(client.list_tasks([_parse_state(text) for text in state or ()]))
        if json:
            return print_json(tasks)
        rows = (
            (t.name, state_name(t.state), f"{t.progress.step}/{t.progress.num_steps}", _loss(t), _seconds_left(t))
            for t in tasks
        )
        table("", ("name", "state", "step", "loss", "left"), rows)


@app.command(epilog="Example: muxtune task get tenants/default/tasks/replies --json")
@app.command("show", hidden=True)
def get(name: NameArgument, data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Show one task: spec, state, progress, failure. Device seconds and tokens include work in progress."""
    with open_client(data) as client:
        task = client.get_task(name)
        if json:
            return print_json([task])
        console.print(str(task))


@app.command(epilog="Example: muxtune task watch tenants/default/tasks/replies --after 12")
def watch(
    name: NameArgument,
    after: Annotated[int, typer.Option(help="Show events after this sequence number.")] = 0,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Show a task's events until it ends. The exit status is 0 if it SUCCEEDED."""
    with open_client(data) as client:
        for event in client.watch_task(name, after):
            if json:
                print_json([event])
            else:
                console.print(f"{event.sequence:>5} {describe(event)}")
        if client.get_task(name).state != task_pb2.TASK_STATE_SUCCEEDED:
            raise typer.Exit(1)


@app.command(epilog="Example: muxtune task cancel tenants/default/tasks/replies")
def cancel(name: NameArgument, data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Stop a task; the adapter trained so far is kept."""
    with open_client(data) as client:
        task = client.cancel_task(name)
        if json:
            return print_json([task])
        console.print(f"{task.name} is {state_name(task.state)}")


def describe(event: event_pb2.TaskEvent) -> str:
    """Return an event as one line."""
    kind = event.WhichOneof("event")
    if kind == "step_done":
        step = event.step_done
        line = f"step {step.step}: loss {step.loss:.4f}, {step.effective_tokens} tokens, lr {step.learning_rate:.2e}"
        if not step.HasField("shadow_check"):
            return line
        check = step.shadow_check
        return (
            f"{line}; alone: loss differs by {check.loss_difference:.1e}, gradient by {check.gradient_difference:.1e}"
        )
    if kind == "evaluated":
        evaluated = event.evaluated
        return f"held-out loss {evaluated.loss:.4f} at step {evaluated.step}, {evaluated.effective_tokens} tokens"
    if kind == "checkpoint_committed":
        return f"checkpoint at step {event.checkpoint_committed.step}"
    return f"{state_name(event.state_changed.state)}: {event.state_changed.message}"


def _parse_state(text: str) -> "task_pb2.TaskState.ValueType":
    try:
        return task_pb2.TaskState.Value(f"TASK_STATE_{text.upper()}")
    except ValueError as error:
        names = ", ".join(state_name(state) for state in task_pb2.TaskState.values() if state)
        raise typer.BadParameter(f'"{text}" is not a state of a task: use {names}') from error


def _loss(task: task_pb2.Task) -> str:
    return f"{task.progress.last_loss:.4f}" if task.progress.HasField("last_loss") else "-"


def _seconds_left(task: task_pb2.Task) -> str:
    return f"{task.progress.seconds_left:.0f} s" if task.progress.HasField("seconds_left") else "-"


def _print_estimate(estimate: task_pb2.TaskEstimate, json: bool) -> None:
    if json:
        return print_json([estimate])
    seconds = f", about {estimate.seconds:.0f} s alone, evaluations included" if estimate.HasField("seconds") else ""
    console.print(
        f"{estimate.num_steps} steps, {estimate.num_train_tokens} tokens, {estimate.num_train_rows} train rows, "
        f"{estimate.num_heldout_rows} held out, adds {estimate.added_bytes / 1e6:.1f} MB{seconds}"
    )
    warn_of_special_text(estimate.num_special_text_rows)
