"""Tells scheduling when a limit was reached: a tenant's of the day, or a task's budget; and when a new day begins."""

import asyncio
import logging

import sqlalchemy as sa

from engine.errors import MuxtuneError
from engine.task import TaskState
from muxtune.v1 import operator_pb2
from services.admission.policy import quotas
from services.admission.store.change_notifier import ChangeNotifier
from services.admission.store.database import Database
from services.admission.store.tables import tasks

_EVERY_SECONDS = 1.0
_log = logging.getLogger(__name__)


class LimitsWatcher:
    """A hint each time another set of tenants has to wait, or of tasks to be stopped."""

    def __init__(self, database: Database, default: operator_pb2.Quota, notifier: ChangeNotifier) -> None:
        self._database, self._default, self._notifier = database, default, notifier
        self._seen = (frozenset[str](), frozenset[str]())

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.look)
            except MuxtuneError as error:
                _log.warning("limits put off: %s", error)
            await asyncio.sleep(_EVERY_SECONDS)

    def look(self) -> None:
        with self._database.read() as connection:
            waiting = frozenset(quotas.exhausted_tenants(connection, self._default))
            query = sa.select(tasks.c.name).where(tasks.c.state == TaskState.CANCELLING.name)
            stopping = frozenset(connection.execute(query).scalars())
        if (waiting, stopping) != self._seen:
            self._seen = (waiting, stopping)
            self._notifier.notify()
