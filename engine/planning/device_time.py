"""Divides a device's time among tenants by weight, turn by turn: start-time fair queueing.

Every second of the device is charged to a tenant, divided by its weight; the next turn goes to the tenant that was
charged least. So tenants that always have work get time in proportion to their weights, whatever their turns cost, and
a turn that took too long is made good later. Source: P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queuing" (1996).
"""

from collections.abc import Collection, Mapping

# A tenant that could not use its turns, because its data came late, is owed at most this (at weight 1).
MAX_CREDIT_SECONDS = 1.0
# A tenant that shares turns with others, and is ahead of one of them by more than this (at weight 1), waits.
MAX_AHEAD_SECONDS = 0.5


class DeviceTime:
    """Keeps the tenants' accounts. A tenant that joins owes and is owed nothing; one that comes back keeps its debt."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}
        self._charged: dict[str, float] = {}  # seconds over weight
        self._held: set[str] = set()
        self._now = 0.0  # what the tenant of the current turn had been charged before it

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the tenants that have tasks here, and their weights."""
        for tenant in weights.keys() - self._weights.keys():
            self._charged[tenant] = max(self._charged.get(tenant, self._now), self._now)
        self._charged = {t: value for t, value in self._charged.items() if t in weights or value > self._now}
        self._weights = dict(weights)
        self._held &= weights.keys()

    def charged(self, tenants: Collection[str]) -> float:
        """Return what these tenants, which share a turn, have been charged together, over their weights."""
        weights = [self._weights.get(tenant, 1.0) for tenant in tenants]
        charged = [self._charged_or_credit(tenant) for tenant in tenants]
        return sum(w * c for w, c in zip(weights, charged, strict=True)) / sum(weights)

    def hold(self, tenants: Collection[str]) -> set[str]:
        """Return which of these tenants, which share turns, have to wait until the others have had as much.

        A tenant that is more than `MAX_AHEAD_SECONDS` ahead waits until it is no longer ahead.
        """
        least = min((self.charged([tenant]) for tenant in tenants), default=0.0)
        for tenant in tenants:
            ahead = self.charged([tenant]) - least
            if ahead > MAX_AHEAD_SECONDS:
                self._held.add(tenant)
            elif ahead <= 0:
                self._held.discard(tenant)
        return self._held.intersection(tenants)

    def begin_turn(self, tenants: Collection[str]) -> None:
        """Note that the device works for these tenants from now on."""
        self._now = max(self._now, self.charged(tenants))

    def charge(self, tenant: str, seconds: float) -> None:
        """Charge a tenant for a part of a turn."""
        self._charged[tenant] = self._charged_or_credit(tenant) + seconds / self._weights.get(tenant, 1.0)

    def _charged_or_credit(self, tenant: str) -> float:
        return max(self._charged.get(tenant, self._now), self._now - MAX_CREDIT_SECONDS)
