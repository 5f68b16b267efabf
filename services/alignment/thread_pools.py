"""Threads of the alignment service: no kind of work delays another, and no tenant's work another's."""

from services.concurrency.threads import TenantThreads, Threads


class ThreadPools:
    """Pools of threads by kind of work.

    `long`: reading a dataset; most of these threads wait for a slot of services.concurrency.fair_queue.FairQueue.
    `packing`: making microbatches, by the tenants whose tasks share them. `files`: writing uploads to the disk.
    `removals`: deleting from the store.
    """

    def __init__(self) -> None:
        self.long = TenantThreads("long", 128, 4)
        self.packing = TenantThreads("packing", 8, 4)
        self.files = TenantThreads("files", 8, 2)
        self.removals = Threads("removals", 4)
