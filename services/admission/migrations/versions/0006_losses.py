"""Add the column `losses` of tasks: executors that were lost with the task and have not been explained yet."""

import sqlalchemy as sa
from alembic import op

revision = "0006_losses"
down_revision = "0005_attempts_and_terms"


def upgrade() -> None:
    with op.batch_alter_table("tasks") as batch_op:
        batch_op.add_column(sa.Column("losses", sa.String(), server_default="", nullable=False))
