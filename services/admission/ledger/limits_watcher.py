"""Notifies scheduling when a tenant reaches a daily limit, a task uses up its budget, or a new day begins."""

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
from services.concurrency.threads import Threads

_INTERVAL_SECONDS = 1.0
_log = logging.getLogger(__name__)


class LimitsWatcher:
    """Notifies whenever the set of tenants that must wait, or of tasks that must stop, changes."""

    def __init__(
        self, database: Database, default: operator_pb2.Quota, notifier: ChangeNotifier, threads: Threads
    ) -> None:
        self._database, self._default, self._notifier, self._threads = database, default, notifier, threads
        self._last = (frozenset[str](), frozenset[str]())

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            try:
                await self._threads.run(self.check)
            except MuxtuneError as error:
                _log.warning("check of limits failed and will be retried: %s", error)
            await asyncio.sleep(_INTERVAL_SECONDS)

    def check(self) -> None:
        """Compare the database with the last check, and notify of a difference."""
        with self._database.read() as connection:
            waiting = frozenset(quotas.list_exhausted_tenants(connection, self._default))
            query = sa.select(tasks.c.name).where(tasks.c.state == TaskState.CANCELLING.name)
            stopping = frozenset(connection.execute(query).scalars())
        if (waiting, stopping) != self._last:
            self._last = (waiting, stopping)
            self._notifier.notify()
