"""Limits what is in progress at once and shares it fairly: no caller, nor several together, can lock the others out.

Source: dynamic thresholds of shared buffers (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998): what
one may hold is a fraction of what is still free, so a part always stays free for those who hold less.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import OverloadedError

_FREE_PER_HELD = 8  # an owner may hold one place for every eight that are free, and always one


class FairLimit:
    """At most `limit` things (`kind`, in the plural) are in progress. Each has an owner, such as a tenant.

    One owner alone gets a ninth of the limit. Ten owners that hold all they can leave an eleventh 3.4 % of it.
    With `is_shared_fairly=False` one owner may hold them all: for callers that trust each other.
    """

    def __init__(self, kind: str, limit: int, *, is_shared_fairly: bool = True) -> None:
        self._kind, self._num_free, self._is_shared_fairly = kind, limit, is_shared_fairly
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, owner: str) -> Iterator[None]:
        """Hold one place of the owner within the block. Raises OverloadedError if the owner may not have one more."""
        num_held = self._held[owner]
        if self._num_free <= 0 or (self._is_shared_fairly and num_held * _FREE_PER_HELD >= self._num_free):
            raise OverloadedError(self._refusal(owner, num_held), subject=owner)
        self._held[owner] += 1
        self._num_free -= 1
        try:
            yield
        finally:
            self._num_free += 1
            self._held[owner] -= 1
            if not self._held[owner]:
                del self._held[owner]  # the table has only owners with something in progress

    def _refusal(self, owner: str, num_held: int) -> str:
        if not num_held:
            return f"The service has no room for more {self._kind} now. Retry later."
        return f"{owner} has {num_held} {self._kind} in progress, as many as it may have now. Retry when one has ended."
