"""Set `parse_special_tokens` on existing tasks, so that they read the same tokens as before; its default is false."""

import sqlalchemy as sa
from alembic import op

revision = "0004_special_tokens"
down_revision = "0003_leadership"

# TaskSpec{training{parse_special_tokens: true}}: bytes put behind a message are merged into it (protobuf's encoding).
_PARSED = b"\x2a\x03\xc0\x01\x01"


def upgrade() -> None:
    tasks = sa.table("tasks", sa.column("name", sa.String), sa.column("spec", sa.LargeBinary))
    connection = op.get_bind()
    for name, spec in connection.execute(sa.select(tasks.c.name, tasks.c.spec)).all():
        connection.execute(sa.update(tasks).where(tasks.c.name == name).values(spec=bytes(spec) + _PARSED))
