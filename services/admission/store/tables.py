"""Tables of admission's database. Times are integer microseconds since the epoch; protos are stored as bytes."""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, text

metadata = MetaData()
_HAS_ENDED = text("ended IS NOT NULL")

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False, index=True),
    Column("secret_sha256", String, nullable=False),  # the secret is random: no salt is needed
    Column("role", String, nullable=False, server_default="tenant"),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger),
    Column("revoked", BigInteger),
)

datasets = Table(
    "datasets",
    metadata,
    Column("name", String, primary_key=True),
    Column("tenant", String, nullable=False, index=True),
    Column("sha256", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("shapes", String, nullable=False),  # JSON
    Column("created", BigInteger, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", String, primary_key=True),
    Column("tenant", String, nullable=False, index=True),
    Column("manifest_key", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created", BigInteger, nullable=False),
)

tasks = Table(
    "tasks",
    metadata,
    Column("name", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("started", BigInteger),
    Column("ended", BigInteger),
    Column("state", String, nullable=False, index=True),
    Column("dataset", String, nullable=False, index=True),
    Column("spec", LargeBinary, nullable=False),  # TaskSpec
    Column("estimate", LargeBinary, nullable=False),  # TaskEstimate
    Column("progress", LargeBinary, nullable=False),  # TaskProgress
    Column("progress_time", BigInteger),
    Column("failure", LargeBinary),  # TaskFailure
    Column("adapter", String, nullable=False, server_default=""),
    Column("initial_adapter_key", String, nullable=False, server_default=""),
    Column("checkpoint", LargeBinary),  # CheckpointCommitted
    Column("evaluated_step", Integer, nullable=False, server_default="-1"),
    Column("attempt", BigInteger, nullable=False, server_default="0"),
    Column("executor", String, nullable=False, server_default=""),
    Column("last_sequence", BigInteger, nullable=False, server_default="0"),
    Column("trace_parent", String, nullable=False, server_default=""),
    Column("crashes", Integer, nullable=False, server_default="0"),  # see SnapshotTask.num_crashes
    Column("losses", String, nullable=False, server_default=""),  # JSON: services/admission/ledger/crash_tracker.py
    Index("tasks_by_tenant", "tenant", "created", "name"),
    Index("tasks_by_end", "ended", "name", sqlite_where=_HAS_ENDED, postgresql_where=_HAS_ENDED),
)

task_events = Table(
    "task_events",
    metadata,
    Column("task", String, primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("event", LargeBinary, nullable=False),  # TaskEvent
)

requests = Table(
    "requests",
    metadata,
    Column("tenant", String, primary_key=True),
    Column("request_id", String, primary_key=True),
    Column("method", String, nullable=False),
    Column("body_sha256", String, nullable=False),
    Column("resource", String, nullable=False),  # name of what the request created
    Column("created", BigInteger, nullable=False),
    Index("requests_by_age", "tenant", "created"),
)

executors = Table(
    "executors",
    metadata,
    Column("name", String, primary_key=True),
    Column("incarnation", String, nullable=False),
    Column("lease_term", BigInteger, nullable=False),
    Column("lease_seconds", Float, nullable=False),
    Column("is_ended", Boolean, nullable=False),
    Column("executor", LargeBinary, nullable=False),  # plan.Executor
)

incarnations = Table(
    "incarnations",
    metadata,
    Column("executor", String, primary_key=True),
    Column("incarnation", String, primary_key=True),
)

leaderships = Table(
    "leaderships",
    metadata,
    Column("role", String, primary_key=True),
    Column("holder", String, nullable=False, server_default=""),  # empty after a resignation
    Column("incarnation", String, nullable=False, server_default=""),
    Column("term", BigInteger, nullable=False, server_default="0"),
    Column("seconds", Float, nullable=False, server_default="0"),
)

plans = Table(
    "plans",
    metadata,
    Column("version", BigInteger, primary_key=True),
    Column("executor", String, primary_key=True),
    Column("created", BigInteger, nullable=False),
)

quotas = Table(
    "quotas",
    metadata,
    Column("tenant", String, primary_key=True),
    Column("quota", LargeBinary, nullable=False),  # operator.Quota
)

usage = Table(
    "usage",
    metadata,
    Column("tenant", String, primary_key=True),
    Column("day", BigInteger, primary_key=True),  # days since the epoch, UTC
    Column("effective_tokens", BigInteger, nullable=False),
    Column("padding_tokens", BigInteger, nullable=False),
    Column("device_seconds", Float, nullable=False),
    Column("num_steps", BigInteger, nullable=False),
    Index("usage_by_day", "day", "tenant"),
)

# The migrations' triggers refuse changes, and deletions of entries younger than 30 days.
audit_events = Table(
    "audit_events",
    metadata,
    Column("sequence", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("time", BigInteger, nullable=False),
    Column("subject", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("method", String, nullable=False),
    Column("resource", String, nullable=False),
    Column("status_code", String, nullable=False),
    Index("audit_events_by_tenant", "tenant", "sequence"),
    sqlite_autoincrement=True,  # a sequence is never used twice
)
