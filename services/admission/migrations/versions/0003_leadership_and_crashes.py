"""Store the leading scheduler, and the number of times that a task's executors died."""

import sqlalchemy as sa
from alembic import op

revision = "0003_leadership"
down_revision = "0002_accounts_and_audit"


def upgrade() -> None:
    op.create_table(
        "leaderships",
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), server_default="", nullable=False),
        sa.Column("incarnation", sa.String(), server_default="", nullable=False),
        sa.Column("epoch", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("seconds", sa.Float(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("role"),
    )
    with op.batch_alter_table("tasks", schema=None) as batch_op:
        batch_op.add_column(sa.Column("crashes", sa.Integer(), server_default="0", nullable=False))
