"""What tenants may use, and what they used: quotas, and accounts by tenant and day (UTC). Synchronous, no gRPC.

Tokens and device seconds are those of committed steps, charged in the transaction that commits them: each counts once.
"""

import datetime
import math
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from engine.errors import InvalidInputError, QuotaExceededError
from muxtune.v1 import budget_pb2, operator_pb2, task_pb2
from services.admission.store.clock import now
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import adapters, datasets, quotas, usage
from services.admission.store.tables import tasks as tasks_table
from services.admission.store.tasks import UNFINISHED

_DAY_MICROSECONDS = 86_400_000_000
_LIMITS = [field.name for field in operator_pb2.Quota.DESCRIPTOR.fields]

_QUOTA = PreparedStatement(sa.select(quotas.c.quota).where(quotas.c.tenant == sa.bindparam("tenant")))
_NUM_UNFINISHED = PreparedStatement(
    sa.select(sa.func.count().label("number")).where(
        tasks_table.c.tenant == sa.bindparam("tenant"), tasks_table.c.state.in_(map(sa.literal, UNFINISHED))
    )
)
_USED = PreparedStatement(
    sa.select(usage).where(usage.c.tenant == sa.bindparam("tenant"), usage.c.day == sa.bindparam("day"))
)


def today() -> int:
    """Days since the epoch, UTC."""
    return now() // _DAY_MICROSECONDS


def quota_of(connection: sa.Connection, tenant: str, default: operator_pb2.Quota) -> operator_pb2.Quota:
    """The tenant's own limits over the service's."""
    row = _QUOTA.fetch_first(connection, tenant=tenant)
    return over(default, row.quota if row else None)


def set_quota(connection: sa.Connection, tenant: str, quota: operator_pb2.Quota, only: Sequence[str] = ()) -> None:
    """All of it, or `only` these limits. Raises InvalidInputError for a limit that is none."""
    for name in _LIMITS:
        value = getattr(quota, name)
        if not 0 <= value < math.inf:
            raise InvalidInputError.of_field(f"quota.{name}", f"{value} must be finite and not negative; 0: no limit")
    if unknown := set(only) - set(_LIMITS):
        known = ", ".join(_LIMITS)
        raise InvalidInputError.of_field("update_mask", f"{sorted(unknown)[0]!r:.100} is no limit: {known}")
    stored = connection.execute(sa.select(quotas.c.quota).where(quotas.c.tenant == tenant)).scalar()
    kept = operator_pb2.Quota.FromString(stored or b"") if only else operator_pb2.Quota()
    for name in only:
        kept.ClearField(name)  # type: ignore[arg-type]
    for name in only or _LIMITS:
        if quota.HasField(name):  # type: ignore[arg-type]
            setattr(kept, name, getattr(quota, name))
    connection.execute(sa.delete(quotas).where(quotas.c.tenant == tenant))
    connection.execute(sa.insert(quotas).values(tenant=tenant, quota=kept.SerializeToString()))


def charge(connection: sa.Connection, tenant: str, step: task_pb2.StepDone) -> None:
    """Adds a committed step to the tenant's account of today."""
    added = {
        "effective_tokens": step.effective_tokens,
        "padding_tokens": step.padding_tokens,
        "device_seconds": step.device_seconds if math.isfinite(step.device_seconds) else 0.0,
        "num_steps": 1,
    }
    key = {"tenant": tenant, "day": today()}
    sums = {name: usage.c[name] + value for name, value in added.items()}
    if connection.execute(sa.update(usage).filter_by(**key).values(sums)).rowcount == 0:
        connection.execute(sa.insert(usage).values(**key, **added))


def check_task(connection: sa.Connection, tenant: str, quota: operator_pb2.Quota) -> None:
    """Whether a tenant with this quota may have another task now. Raises QuotaExceededError."""
    most = quota.max_unfinished_tasks
    if most and (count := _NUM_UNFINISHED.fetch_all(connection, tenant=tenant)[0].number) >= most:
        raise QuotaExceededError(f"{tenant} has {count} unfinished tasks; at most {most}", subject=tenant)
    has_limits = quota.max_tokens_per_day or quota.max_device_seconds_per_day
    row = _USED.fetch_first(connection, tenant=tenant, day=today()) if has_limits else None
    if row is not None and (why := _exhausted(row, quota)):
        raise QuotaExceededError(f"{tenant} {why}: try again tomorrow (UTC)", subject=tenant)
    _check_held(connection, adapters, tenant, 1, quota.max_adapter_bytes)  # room for the one it will leave


def check_datasets(connection: sa.Connection, tenant: str, added_bytes: int, default: operator_pb2.Quota) -> None:
    """Whether the tenant's datasets may grow by that. Raises QuotaExceededError."""
    _check_held(connection, datasets, tenant, added_bytes, quota_of(connection, tenant, default).max_dataset_bytes)


def check_adapters(connection: sa.Connection, tenant: str, added_bytes: int, default: operator_pb2.Quota) -> None:
    """Whether the tenant's adapters may grow by that. Raises QuotaExceededError."""
    _check_held(connection, adapters, tenant, added_bytes, quota_of(connection, tenant, default).max_adapter_bytes)


def _check_held(connection: sa.Connection, table: sa.Table, tenant: str, added_bytes: int, most: int) -> None:
    if not most:
        return
    query = sa.select(sa.func.coalesce(sa.func.sum(table.c.size_bytes), 0)).where(table.c.tenant == tenant)
    if (held := int(connection.execute(query).scalar_one())) + added_bytes > most:
        raise QuotaExceededError(
            f"{tenant} has {table.name} of {held} bytes; at most {most} in all, with what is to come: delete some",
            subject=tenant,
        )


def exhausted_tenants(connection: sa.Connection, default: operator_pb2.Quota) -> set[str]:
    """Who used up a limit of today."""
    both = usage.join(quotas, quotas.c.tenant == usage.c.tenant, isouter=True)
    query = sa.select(usage, quotas.c.quota).select_from(both).where(usage.c.day == today())
    return {row.tenant for row in connection.execute(query) if _exhausted(row, over(default, row.quota))}


def over(default: operator_pb2.Quota, own: bytes | None) -> operator_pb2.Quota:
    """The service's limits with a tenant's own, as `quotas` has them, over them."""
    found = operator_pb2.Quota()
    found.CopyFrom(default)
    found.MergeFromString(own or b"")
    return found


def _exhausted(row: Any, quota: operator_pb2.Quota) -> str:
    """Which limit of the day an account has used up; "" if none."""
    if 0 < quota.max_tokens_per_day <= row.effective_tokens:
        return f"trained {row.effective_tokens} tokens today, of {quota.max_tokens_per_day}"
    if 0 < quota.max_device_seconds_per_day <= row.device_seconds:
        return f"used {row.device_seconds:.0f} device seconds today, of {quota.max_device_seconds_per_day:g}"
    return ""


def check_budget(budget: budget_pb2.Budget) -> None:
    """Raises InvalidInputError for a limit that is none."""
    for name in ("max_tokens", "max_device_seconds"):
        value = getattr(budget, name)
        if not 0 <= value < math.inf:
            raise InvalidInputError.of_field(
                f"spec.budget.{name}", f"{value} must be finite and not negative; 0: no limit"
            )


def spent(budget: budget_pb2.Budget, progress: task_pb2.TaskProgress) -> str:
    """Which limit of a task's budget is used up, for its tenant; "" if none."""
    if 0 < budget.max_tokens <= progress.effective_tokens:
        return f"its budget of {budget.max_tokens} tokens is used up"
    if 0 < budget.max_device_seconds <= progress.device_seconds:
        return f"its budget of {budget.max_device_seconds:g} device seconds is used up"
    return ""


def page(connection: sa.Connection, tenant: str, before: tuple[int, str] | None, limit: int) -> Sequence[Any]:
    """Accounts, newest day first, after the (day, tenant) of the page before."""
    query = sa.select(usage).order_by(usage.c.day.desc(), usage.c.tenant.desc())
    if tenant:
        query = query.where(usage.c.tenant == tenant)
    if before:
        query = query.where(sa.tuple_(usage.c.day, usage.c.tenant) < sa.tuple_(*map(sa.literal, before)))
    return connection.execute(query.limit(limit)).all()


def to_proto(row: Any) -> operator_pb2.DayUsage:
    return operator_pb2.DayUsage(
        tenant=row.tenant,
        date=(datetime.date(1970, 1, 1) + datetime.timedelta(days=row.day)).isoformat(),
        effective_tokens=row.effective_tokens,
        padding_tokens=row.padding_tokens,
        device_seconds=row.device_seconds,
        num_steps=row.num_steps,
    )
