"""Checkpoints of tasks that ended: nobody resumes from them, so they go. Synchronous, no gRPC."""

import sqlalchemy as sa

from engine.task import TaskState
from services.admission.database import Database
from services.admission.tables import tasks
from services.artifacts import ArtifactStore

_FINAL = [state.name for state in TaskState if state.is_final]


def sweep_checkpoints(database: Database, artifacts: ArtifactStore) -> int:
    """Deletes them; how many tasks' it deleted. Killed midway, the next sweep goes on. Raises UnavailableError."""
    with database.read() as connection:
        query = sa.select(tasks.c.name).where(tasks.c.state.in_(_FINAL), tasks.c.checkpoint.is_not(None))
        names = connection.execute(query).scalars().all()
    for name in names:
        artifacts.delete_folder(f"{name}/checkpoints")
        with database.write() as connection:
            connection.execute(sa.update(tasks).where(tasks.c.name == name).values(checkpoint=None))
    return len(names)
