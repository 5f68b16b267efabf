"""Rename the columns called "epoch" to `attempt`, `lease_term` and `term`: epochs are passes over data."""

from alembic import op

revision = "0005_attempts_and_terms"
down_revision = "0004_special_tokens"

_RENAMED = (
    ("tasks", "attempt_epoch", "attempt"),
    ("executors", "lease_epoch", "lease_term"),
    ("leaderships", "epoch", "term"),
)


def upgrade() -> None:
    for table, old, new in _RENAMED:
        op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")  # SQLite and PostgreSQL agree on this
