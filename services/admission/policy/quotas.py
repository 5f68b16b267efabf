"""Quotas and usage of tenants; usage is recorded by tenant and day (UTC). Synchronous, no gRPC.

Work is charged in the transaction that commits its result, so that its tokens and device seconds count once.
"""

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from engine.errors import InvalidInputError, QuotaExceededError
from muxtune.v1 import budget_pb2, event_pb2, operator_pb2, plan_pb2, task_pb2
from services.admission.store.clock import now
from services.admission.store.pages import Page, read_page
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import adapters, datasets, quotas, usage
from services.admission.store.tables import tasks as tasks_table
from services.admission.store.tasks import UNFINISHED

_DAY_MICROSECONDS = 86_400_000_000
_LIMITS = [field.name for field in operator_pb2.Quota.DESCRIPTOR.fields]
_MAX_SECONDS, _MAX_TOKENS = 1e9, 1 << 40  # of one step or evaluation: 30 years

_QUOTA = PreparedStatement(sa.select(quotas.c.quota).where(quotas.c.tenant == sa.bindparam("tenant")))
_UNFINISHED = PreparedStatement(
    sa.select(
        sa.func.count().label("number"),
        sa.func.coalesce(sa.func.sum(sa.func.length(tasks_table.c.spec)), 0).label("spec_bytes"),
    ).where(tasks_table.c.tenant == sa.bindparam("tenant"), tasks_table.c.state.in_(map(sa.literal, UNFINISHED)))
)
_USAGE = PreparedStatement(
    sa.select(usage).where(usage.c.tenant == sa.bindparam("tenant"), usage.c.day == sa.bindparam("day"))
)


def today() -> int:
    """Return the number of days since the epoch, UTC."""
    return now() // _DAY_MICROSECONDS


def get_quota(connection: sa.Connection, tenant: str, default: operator_pb2.Quota) -> operator_pb2.Quota:
    """Return the tenant's limits; the service's default applies to each limit that the tenant has not set."""
    row = _QUOTA.fetch_first(connection, tenant=tenant)
    return merge_quota(default, row.quota if row else None)


def set_quota(connection: sa.Connection, tenant: str, quota: operator_pb2.Quota, fields: Sequence[str] = ()) -> None:
    """Store all limits, or only those in `fields`. Raises InvalidInputError for a bad value or an unknown field."""
    for name in _LIMITS:
        value = getattr(quota, name)
        if not 0 <= value < math.inf:
            raise InvalidInputError.of_field(
                f"quota.{name}", f"{value} must be finite and not negative; 0 means no limit"
            )
    if unknown := set(fields) - set(_LIMITS):
        description = f"{sorted(unknown)[0]!r:.100} must be one of {', '.join(_LIMITS)}"
        raise InvalidInputError.of_field("update_mask", description)
    stored = connection.execute(sa.select(quotas.c.quota).where(quotas.c.tenant == tenant)).scalar()
    merged = operator_pb2.Quota.FromString(stored or b"") if fields else operator_pb2.Quota()
    for name in fields:
        merged.ClearField(name)  # type: ignore[arg-type]
    for name in fields or _LIMITS:
        if quota.HasField(name):  # type: ignore[arg-type]
            setattr(merged, name, getattr(quota, name))
    connection.execute(sa.delete(quotas).where(quotas.c.tenant == tenant))
    connection.execute(sa.insert(quotas).values(tenant=tenant, quota=merged.SerializeToString()))


@dataclass(frozen=True)
class Work:
    """Work of a device for one task: effective and padding tokens, and seconds. Each is finite and not negative."""

    effective_tokens: int
    padding_tokens: int
    device_seconds: float

    @classmethod
    def reported(cls, report: event_pb2.StepDone | event_pb2.Evaluated | plan_pb2.WorkInProgress) -> "Work":
        """Return the work that an executor reports. Impossible values are replaced: executors are not trusted."""
        seconds = report.device_seconds if math.isfinite(report.device_seconds) else 0.0
        effective_tokens, padding_tokens = (
            min(max(0, tokens), _MAX_TOKENS) for tokens in (report.effective_tokens, report.padding_tokens)
        )
        return cls(effective_tokens, padding_tokens, min(max(0.0, seconds), _MAX_SECONDS))

    def beyond(self, other: "Work") -> "Work":
        """Return the work that this total has and the other has not."""
        return Work(
            max(0, self.effective_tokens - other.effective_tokens),
            max(0, self.padding_tokens - other.padding_tokens),
            max(0.0, self.device_seconds - other.device_seconds),
        )

    def __bool__(self) -> bool:
        return bool(self.effective_tokens or self.padding_tokens or self.device_seconds)


def charge(connection: sa.Connection, tenant: str, work: Work, num_steps: int = 0) -> None:
    """Add work, and steps that it completed, to the tenant's usage of today."""
    added = {**asdict(work), "num_steps": num_steps}
    key = {"tenant": tenant, "day": today()}
    sums = {name: usage.c[name] + value for name, value in added.items()}
    if connection.execute(sa.update(usage).filter_by(**key).values(sums)).rowcount == 0:
        connection.execute(sa.insert(usage).values(**key, **added))


def check_new_task(connection: sa.Connection, tenant: str, quota: operator_pb2.Quota, spec_bytes: int) -> None:
    """Raises QuotaExceededError unless a tenant with this quota may create another task, of this size, now."""
    max_tasks, max_bytes = quota.max_unfinished_tasks, quota.max_unfinished_spec_bytes
    unfinished = _UNFINISHED.fetch_all(connection, tenant=tenant)[0] if max_tasks or max_bytes else None
    if unfinished and 0 < max_tasks <= unfinished.number:
        raise QuotaExceededError(
            f"{tenant} has {unfinished.number} unfinished tasks; at most {max_tasks}: wait for one or cancel one",
            subject=tenant,
        )
    if unfinished and 0 < max_bytes < int(unfinished.spec_bytes) + spec_bytes:
        raise QuotaExceededError(
            f"{tenant} has specs of {unfinished.spec_bytes} bytes in its unfinished tasks, this one has {spec_bytes}; "
            f"at most {max_bytes}: name modules by their last parts, wait for a task or cancel one",
            subject=tenant,
        )
    has_limits = quota.max_tokens_per_day or quota.max_device_seconds_per_day
    row = _USAGE.fetch_first(connection, tenant=tenant, day=today()) if has_limits else None
    if row is not None and (reason := _describe_exhausted(row, quota)):
        raise QuotaExceededError(f"{tenant} {reason}: try again tomorrow (UTC)", subject=tenant)
    _check_total(connection, adapters, tenant, 1, quota.max_adapter_bytes)  # the task will leave an adapter


def check_bytes(
    connection: sa.Connection,
    table: sa.Table,
    tenant: str,
    added_bytes: int,
    default: operator_pb2.Quota,
    *,
    count_stored: bool = True,
) -> None:
    """Raises QuotaExceededError unless the tenant's datasets or adapters (`table`) may grow by `added_bytes`."""
    quota = get_quota(connection, tenant, default)
    max_bytes = quota.max_dataset_bytes if table is datasets else quota.max_adapter_bytes
    _check_total(connection, table, tenant, added_bytes, max_bytes, count_stored=count_stored)


def _check_total(
    connection: sa.Connection,
    table: sa.Table,
    tenant: str,
    added_bytes: int,
    max_bytes: int,
    *,
    count_stored: bool = True,
) -> None:
    if not max_bytes:
        return
    query = sa.select(sa.func.coalesce(sa.func.sum(table.c.size_bytes), 0)).where(table.c.tenant == tenant)
    total = int(connection.execute(query).scalar_one()) if count_stored else 0
    if total + added_bytes > max_bytes:
        raise QuotaExceededError(
            f"{tenant} has {total} bytes of {table.name} and adds {added_bytes}, uploads in progress included; at most "
            f"{max_bytes}: delete some",
            subject=tenant,
        )


def list_exhausted_tenants(connection: sa.Connection, default: operator_pb2.Quota) -> set[str]:
    """Return the tenants that have used up a limit of today."""
    both = usage.join(quotas, quotas.c.tenant == usage.c.tenant, isouter=True)
    query = sa.select(usage, quotas.c.quota).select_from(both).where(usage.c.day == today())
    return {
        row.tenant for row in connection.execute(query) if _describe_exhausted(row, merge_quota(default, row.quota))
    }


def merge_quota(default: operator_pb2.Quota, tenant_quota: bytes | None) -> operator_pb2.Quota:
    """Return the service's limits, replaced by those that the tenant has set (a serialized Quota, or None)."""
    merged = operator_pb2.Quota()
    merged.CopyFrom(default)
    merged.MergeFromString(tenant_quota or b"")
    return merged


def _describe_exhausted(row: Any, quota: operator_pb2.Quota) -> str:
    """Return the daily limit that the usage has reached, as a phrase, or ""."""
    if 0 < quota.max_tokens_per_day <= row.effective_tokens:
        return f"has used {row.effective_tokens} tokens today; at most {quota.max_tokens_per_day}"
    if 0 < quota.max_device_seconds_per_day <= row.device_seconds:
        return f"has used {row.device_seconds:.0f} device seconds today; at most {quota.max_device_seconds_per_day:g}"
    return ""


def check_budget(budget: budget_pb2.Budget) -> None:
    """Raises InvalidInputError for a negative or infinite limit."""
    for name in ("max_tokens", "max_device_seconds"):
        value = getattr(budget, name)
        if not 0 <= value < math.inf:
            raise InvalidInputError.of_field(
                f"spec.budget.{name}", f"{value} must be finite and not negative; 0 means no limit"
            )


def describe_spent_budget(budget: budget_pb2.Budget, progress: task_pb2.TaskProgress) -> str:
    """Return the limit of the task's budget that is used up, as a sentence, or ""."""
    num_tokens = progress.effective_tokens + progress.evaluated_tokens
    num_tokens += progress.tokens_in_progress + progress.lost_tokens
    if 0 < budget.max_tokens <= num_tokens:
        return f"the budget of {budget.max_tokens} tokens is used up"
    if 0 < budget.max_device_seconds <= progress.device_seconds:
        return f"the budget of {budget.max_device_seconds:g} device seconds is used up"
    return ""


def list_usage(connection: sa.Connection, tenant: str, before: tuple[int, str] | None, size: int) -> Page:
    """Return usage by day, newest first, of one tenant or (empty) of all. `before`: (day, tenant) of the last row of
    the page before."""
    query = sa.select(usage).order_by(usage.c.day.desc(), usage.c.tenant.desc())
    if tenant:
        query = query.where(usage.c.tenant == tenant)
    if before:
        query = query.where(sa.tuple_(usage.c.day, usage.c.tenant) < sa.tuple_(*map(sa.literal, before)))
    return read_page(connection, query, size)


def usage_to_proto(row: Any) -> operator_pb2.DayUsage:
    return operator_pb2.DayUsage(
        tenant=row.tenant,
        date=(datetime.date(1970, 1, 1) + datetime.timedelta(days=row.day)).isoformat(),
        effective_tokens=row.effective_tokens,
        padding_tokens=row.padding_tokens,
        device_seconds=row.device_seconds,
        num_steps=row.num_steps,
    )
