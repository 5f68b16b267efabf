"""Index what old rows are found by; let audit entries be deleted that are older than 30 days."""

import sqlalchemy as sa
from alembic import op

revision = "0007_retention"
down_revision = "0006_losses"

_HAS_ENDED = sa.text("ended IS NOT NULL")
_REFUSAL = "the audit log keeps its entries for 30 days"
_MICROSECONDS = 30 * 86_400 * 1_000_000


def upgrade() -> None:
    op.create_index("tasks_by_end", "tasks", ["ended", "name"], sqlite_where=_HAS_ENDED, postgresql_where=_HAS_ENDED)
    op.create_index("requests_by_age", "requests", ["tenant", "created"])
    for statement in _guards(op.get_bind().dialect.name):
        op.execute(statement)


def _guards(dialect: str) -> list[str]:
    """Return the statements that replace the trigger on deletions. The database's own clock decides."""
    if dialect == "sqlite":
        return [
            "DROP TRIGGER audit_events_no_delete",
            "CREATE TRIGGER audit_events_no_delete BEFORE DELETE ON audit_events "
            f"WHEN OLD.time > CAST(strftime('%s', 'now') AS INTEGER) * 1000000 - {_MICROSECONDS} "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
        ]
    return [
        "DROP TRIGGER audit_events_only_grow ON audit_events",
        "CREATE TRIGGER audit_events_only_grow BEFORE UPDATE OR TRUNCATE ON audit_events "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_events_refuse()",
        "CREATE FUNCTION audit_events_refuse_young() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF OLD.time > extract(epoch FROM clock_timestamp()) * 1000000 - {_MICROSECONDS} "
        f"THEN RAISE EXCEPTION '{_REFUSAL}'; END IF; RETURN OLD; END $$",
        "CREATE TRIGGER audit_events_keep_young BEFORE DELETE ON audit_events "
        "FOR EACH ROW EXECUTE FUNCTION audit_events_refuse_young()",
    ]
