"""The `muxtune` command: `muxtune --help`."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli import adapter, dataset, executor, key, plan, task, tenant
from muxtune.cli.certs import certs
from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, print_errors
from muxtune.cli.terminal import CommandGroup, console, error_console
from muxtune.local.mesh import DEFAULT_BACKBONE, READY_SECONDS, Mesh, default_backbone, stopped_by_signals
from muxtune.local.supervisor import Supervisor

app = typer.Typer(
    cls=CommandGroup,
    help="Fine-tune many tenants' PEFT tasks at once on one shared, frozen LLM backbone.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(dataset.app, name="dataset")
app.add_typer(task.app, name="task")
app.add_typer(adapter.app, name="adapter")
app.add_typer(plan.app, name="plan")
app.add_typer(executor.app, name="executor")
app.add_typer(key.app, name="key")
app.add_typer(tenant.app, name="tenant")
app.command(epilog="Example: muxtune certs /etc/muxtune/certs --host muxtune.example.com")(certs)

_CHECK_SECONDS = 0.2
_POLICIES = ("MUXTUNE_OIDC_", "MUXTUNE_MAX_", "MUXTUNE_KEEP_")
_ROTATION = ("MUXTUNE_TRACE_FILE_BYTES", "MUXTUNE_TRACE_FILES")


@app.command(epilog="Example: muxtune up --data /var/lib/muxtune --backbone llama=/models/Llama-3.2-1B")
def up(
    data: DataOption = DEFAULT_DATA,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of a GGUF file or Hugging Face folder; default: SmolLM2-135M-Instruct."),
    ] = None,
    otlp_endpoint: Annotated[
        str, typer.Option(help="OTLP endpoint for traces and metrics; default: traces go to a file.")
    ] = "",
    ready_seconds: Annotated[
        float, typer.Option(min=1, help="Time in which all services must be healthy; a large backbone loads for long.")
    ] = READY_SECONDS,
) -> None:
    """Start the four services on loopback. Stop with Ctrl-C; the next `muxtune up` resumes all tasks.

    MUXTUNE_OIDC_* (an identity provider), MUXTUNE_MAX_* (limits of tenants) and MUXTUNE_KEEP_* (how long rows are kept)
    are passed on to admission.
    MUXTUNE_TRACE_FILE_BYTES (default 64 MiB) and MUXTUNE_TRACE_FILES (8) bound the files of traces.
    """
    with print_errors(), stopped_by_signals():
        settings = _inherited_settings()
        mesh = Mesh(data, _backbones(backbone), otlp_endpoint, settings, ready_seconds=ready_seconds)
        try:
            console.print(f"starting on {data} ...")
            mesh.start()
            _announce(mesh)
            supervisor = Supervisor(mesh, error_console.print)
            while True:
                supervisor.check()
                mesh.rotate_logs()
                time.sleep(_CHECK_SECONDS)
        except KeyboardInterrupt:
            console.print("stopping: tasks are checkpointed, and resume at the next start ...")
        finally:
            codes = mesh.stop()
        failed = [f"{service} (status {code})" for service, code in codes.items() if code]
        if failed:
            error_console.print(f"error: services did not stop cleanly: {', '.join(failed)}; see {data / 'logs'}")
            raise typer.Exit(1)
        console.print("stopped")


@app.command(epilog="Example: muxtune demo --data /tmp/demo")
def demo(
    data: Annotated[Path, typer.Option("--data", help="Data folder of the demo's mesh; it is emptied first.")] = Path(
        "demo-data"
    ),
) -> None:
    """Train five tasks of three tenants at once on one backbone, and show their results."""
    from muxtune.local.demo import run_demo

    with print_errors(), stopped_by_signals():
        try:
            if not run_demo(data, console):
                raise typer.Exit(1)
        except KeyboardInterrupt as error:
            error_console.print("interrupted: the services are stopped")
            raise typer.Exit(130) from error


@app.command(epilog="Example: muxtune verify --steps 50")
def verify(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each task.")] = 50,
    methods: Annotated[str, typer.Option(help="Methods to verify, comma separated; default: all.")] = "",
    backbone: Annotated[Path | None, typer.Option(help="Hugging Face folder; default: a small random Llama.")] = None,
    json: JsonOption = False,
) -> None:
    """Verify that a task trained among others gets the adapter that it gets alone, in HF PEFT and in muxtune itself."""
    from muxtune.cli.verify import run_verification

    if code := run_verification(steps, methods, backbone, json):
        raise typer.Exit(code)


def _backbones(options: list[str] | None) -> dict[str, Path]:
    if not options:
        return {DEFAULT_BACKBONE: default_backbone()}
    pairs = [option.partition("=") for option in options]
    for name, separator, path in pairs:
        if not (name and separator and Path(path).exists()):
            raise typer.BadParameter(f'"{name}{separator}{path}": write NAME=PATH of a file or folder that exists')
    return {name: Path(path) for name, _, path in pairs}


def _inherited_settings() -> dict[str, dict[str, str]]:
    """Return the settings that services take from this environment, by service ("*": all); they inherit no others."""
    policies = {name: value for name, value in os.environ.items() if name.startswith(_POLICIES)}
    rotation = {name: os.environ[name] for name in _ROTATION if name in os.environ}
    return {"*": rotation, "admission": policies}


def _announce(mesh: Mesh) -> None:
    for service, address in mesh.addresses.items():
        console.print(f"  {service:<11} {address}")
    console.print("All services are healthy. Clients need:", style="green")
    console.print(f"  export MUXTUNE_ADDRESS={mesh.addresses['admission']}")
    console.print(f"  export MUXTUNE_CA={mesh.ca.absolute()}")
    console.print(f"  export MUXTUNE_API_KEY={mesh.api_key}")
    console.print(f"Logs in {mesh.data / 'logs'}. Stop with Ctrl-C; the next start resumes all tasks.")


if __name__ == "__main__":
    app()
