"""`muxtune tenant`: shows and sets quotas, and shows usage and the audit log, for operators."""

from typing import Annotated, Any

import typer

from muxtune.cli.context import DEFAULT_DATA, DataOption, JsonOption, operator_channel
from muxtune.cli.terminal import console, print_json, table
from muxtune.errors import raising
from muxtune.resource_names import tenant_name
from muxtune.v1 import operator_pb2, operator_pb2_grpc

app = typer.Typer(help="Quotas, usage and audit log of tenants (for operators).", no_args_is_help=True)
TenantOption = Annotated[str, typer.Option(help="Show only this tenant.")]


@app.command(epilog="Example: muxtune tenant quota acme --max-tokens-per-day 5000000")
def quota(
    tenant: Annotated[str, typer.Argument(help="ID of the tenant.")],
    max_dataset_bytes: Annotated[int | None, typer.Option(help="Bytes of all datasets; 0: no limit.")] = None,
    max_adapter_bytes: Annotated[int | None, typer.Option(help="Bytes of all adapters; 0: no limit.")] = None,
    max_unfinished_tasks: Annotated[int | None, typer.Option(help="Tasks not ended; 0: no limit.")] = None,
    max_unfinished_spec_bytes: Annotated[
        int | None, typer.Option(help="Bytes of the specs of tasks not ended; 0: no limit.")
    ] = None,
    max_tokens_per_day: Annotated[
        int | None, typer.Option(help="Effective tokens, evaluations included; 0: no limit.")
    ] = None,
    max_device_seconds_per_day: Annotated[float | None, typer.Option(help="Evaluations included; 0: no limit.")] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Limits that are left out return to the service's defaults.")
    ] = False,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Show a tenant's quota, or change it with options; limits that are left out stay as they are."""
    limits: dict[str, Any] = {
        "max_dataset_bytes": max_dataset_bytes,
        "max_adapter_bytes": max_adapter_bytes,
        "max_unfinished_tasks": max_unfinished_tasks,
        "max_unfinished_spec_bytes": max_unfinished_spec_bytes,
        "max_tokens_per_day": max_tokens_per_day,
        "max_device_seconds_per_day": max_device_seconds_per_day,
    }
    with operator_channel(data, "admission") as (channel, metadata), raising():
        stub = operator_pb2_grpc.OperatorServiceStub(channel)
        changed = [name for name, value in limits.items() if value is not None]
        if changed or reset:
            request = operator_pb2.SetQuotaRequest(tenant=tenant_name(tenant), quota=operator_pb2.Quota(**limits))
            request.update_mask.paths.extend([] if reset else changed)
            current = stub.SetQuota(request, timeout=30, metadata=metadata).quota
        else:
            get = operator_pb2.GetQuotaRequest(tenant=tenant_name(tenant))
            current = stub.GetQuota(get, timeout=30, metadata=metadata).quota
        if json:
            return print_json([current])
        for name in limits:
            console.print(f"{name}: {getattr(current, name) or 'no limit'}")


@app.command(epilog="Example: muxtune tenant usage --tenant acme")
def usage(tenant: TenantOption = "", data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Show the usage of tenants by day (UTC), newest first: steps and evaluations, also those in progress."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        stub, token = operator_pb2_grpc.OperatorServiceStub(channel), ""
        days: list[operator_pb2.DayUsage] = []
        while True:
            request = operator_pb2.ListUsageRequest(tenant=tenant_name(tenant), page_size=1000, page_token=token)
            answer = stub.ListUsage(request, timeout=30, metadata=metadata)
            days.extend(answer.days)
            if not (token := answer.next_page_token):
                break
        if json:
            return print_json(days)
        rows = ((d.date, d.tenant, d.effective_tokens, d.padding_tokens, f"{d.device_seconds:.1f}", d.num_steps)
                for d in days)  # fmt: skip
        table("", ("day", "tenant", "tokens", "padding", "device seconds", "steps"), rows)


@app.command(epilog="Example: muxtune tenant audit --after 1200 --json")
def audit(
    after: Annotated[int, typer.Option(min=0, help="Show events after this sequence number.")] = 0,
    tenant: TenantOption = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Show the audit log, oldest first, at most 1000 events: who called what, when, and the status."""
    with operator_channel(data, "admission") as (channel, metadata), raising():
        request = operator_pb2.ListAuditEventsRequest(after_sequence=after, page_size=1000, tenant=tenant_name(tenant))
        stub = operator_pb2_grpc.OperatorServiceStub(channel)
        events = stub.ListAuditEvents(request, timeout=30, metadata=metadata).events
        if json:
            return print_json(events)
        for e in events:
            caller = f"{e.subject} of {e.tenant}" if e.tenant else e.subject
            action = f"{e.method.rpartition('/')[2]} {e.resource or '-'}: {e.status_code}"
            line = f"{e.sequence} {e.time.ToDatetime():%Y-%m-%d %H:%M:%S} {caller}: {action}"
            console.print(line.replace("\n", "\\n"))  # a name that a caller chose cannot start a line
