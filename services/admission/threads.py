"""Threads of admission by kind of work, so that no client's work delays a lease, and no tenant's work another's."""

from collections.abc import Callable
from typing import TypeVar

from services.concurrency.fair_queue import FairQueue
from services.concurrency.threads import TenantThreads, Threads

T = TypeVar("T")


class AdmissionThreads:
    """Pools of threads, built once.

    `ledger`: leases, plans, results and who leads; only scheduling and admission itself use it.
    `operators`, `cleanup`: calls of operators; the garbage collector. `clients`: reads and changes of the database.
    `removals`: bytes of datasets, for which alignment is waited. `transfers`: files on the disk and in the store.
    `checks`: computation for clients, one at a time, in turns of `check_queue`.
    The pools that use the database, all but `transfers` and `checks`, have 13 threads; the database has 15 connections,
    SQLAlchemy's default.
    """

    def __init__(self) -> None:
        self.ledger = Threads("ledger", 4)
        self.operators = Threads("operators", 1)
        self.cleanup = Threads("cleanup", 2)
        self.clients = TenantThreads("clients", 4, 2)
        self.removals = TenantThreads("removals", 2, 1)
        self.transfers = TenantThreads("transfers", 16, 4)
        self.checks = TenantThreads("checks", 32, 2)
        self.check_queue = FairQueue(num_slots=1)  # each one delays other calls, by Python's lock

    async def compute(self, tenant: str, work: Callable[[Callable[[], object]], T]) -> T:
        """Return what `work` returns; it computes in the tenant's turns, and calls its argument to yield them."""

        def run() -> T:
            with self.check_queue.slot(tenant) as slot:
                return work(slot.yield_to_waiting)

        return await self.checks.run(tenant, run)
