"""`muxtune dataset`: uploads, lists, checks and deletes datasets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from muxtune.cli.context import DEFAULT_DATA, DataOption, IdOption, JsonOption, open_client
from muxtune.cli.spec import read_training
from muxtune.cli.terminal import console, print_json, table, visible
from muxtune.v1 import dataset_pb2, task_pb2

app = typer.Typer(
    help="Upload, list, get, check and delete datasets: JSON Lines with messages, prompt/completion or text.",
    no_args_is_help=True,
)


NameArgument = Annotated[str, typer.Argument(help="tenants/TENANT/datasets/ID")]


@app.command(epilog="Example: muxtune dataset upload examples/support_replies.jsonl --id replies")
@app.command("put", hidden=True)
def upload(
    file: Annotated[Path, typer.Argument(help="JSON Lines file.")],
    id: IdOption = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Upload a dataset. Every line is checked before anything is stored."""
    with open_client(data) as client:
        dataset = client.upload_dataset(file, id)
        if json:
            return print_json([dataset])
        console.print(f"{dataset.name}: {dataset.num_rows} rows, {dataset.size_bytes} bytes, SHA-256 {dataset.sha256}")


@app.command("list", epilog="Example: muxtune dataset list --json")
@app.command("ls", hidden=True)
def list_(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """List datasets, newest first."""
    with open_client(data) as client:
        datasets = list(client.list_datasets())
        if json:
            return print_json(datasets)
        rows = ((d.name, d.num_rows, d.size_bytes, ", ".join(d.num_rows_by_shape), d.sha256[:12]) for d in datasets)
        table("", ("name", "rows", "bytes", "shape", "sha256"), rows)


@app.command(epilog="Example: muxtune dataset get tenants/default/datasets/replies --json")
def get(name: NameArgument, data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Show one dataset: rows by shape, bytes, SHA-256."""
    with open_client(data) as client:
        dataset = client.get_dataset(name)
        if json:
            return print_json([dataset])
        console.print(str(dataset))


@app.command(epilog="Example: muxtune dataset check tenants/default/datasets/replies --backbone smollm2")
def check(
    name: NameArgument,
    backbone: Annotated[str, typer.Option(help="Backbone that would read it.")] = "smollm2",
    file: Annotated[Path | None, typer.Option("-f", "--file", help="YAML of a task, for its `training`.")] = None,
    max_sequence_tokens: Annotated[int, typer.Option(help="Maximum tokens of a row, without --file.")] = 512,
    samples: Annotated[int, typer.Option(help="Number of rendered rows to show.")] = 3,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Show how a task would read a dataset: rendered rows, tokens that bear loss, lengths, refused rows."""
    default = task_pb2.Training(num_epochs=1, max_sequence_tokens=max_sequence_tokens)
    with open_client(data) as client:
        training = read_training(file) if file else default
        report = client.preflight_dataset(name, backbone, training, samples)
        if json:
            return print_json([report])
        _show(report)


@app.command(epilog="Example: muxtune dataset delete tenants/default/datasets/replies")
@app.command("rm", hidden=True)
def delete(name: NameArgument, data: DataOption = DEFAULT_DATA) -> None:
    """Delete a dataset that no unfinished task reads."""
    with open_client(data) as client:
        client.delete_dataset(name)
        console.print(f"{name} is deleted")


def _show(report: dataset_pb2.PreflightReport) -> None:
    for row in report.samples:
        text = Text(f"line {row.line}, {row.num_tokens} tokens{', held out' if row.is_heldout else ''}: ", style="bold")
        for piece in row.pieces:
            text.append(visible(piece.text), style="green" if piece.bears_loss else "dim")
        console.print(text)
    console.print("(green bears loss)")
    buckets = ((f"{b.from_tokens} to {b.to_tokens - 1}", b.num_rows) for b in report.length_histogram)
    table("tokens a row", ("tokens", "rows"), buckets)
    console.print(
        f"{report.num_rows} rows: {report.num_train_rows} train, {report.num_heldout_rows} held out, "
        f"{report.num_truncated_rows} truncated, {report.num_refused_rows} refused. An epoch has "
        f"{report.num_tokens_per_epoch} tokens, {report.num_target_tokens_per_epoch} of them bear loss."
    )
    for row_refused in report.refused_rows:
        console.print(f"  line {row_refused.line}: {row_refused.reason}")
    warn_of_special_text(report.num_special_text_rows)


def warn_of_special_text(num_rows: int) -> None:
    if num_rows:
        console.print(
            f"{num_rows} rows contain the text of special tokens, which is read as plain text. If the rows were "
            "rendered with a chat template already, set training.parse_special_tokens to true.",
            style="yellow",
        )
