"""Who has had more than its share of the device while others wait. Pure.

The virtual token counter of Sheng et al. ("Fairness in Serving Large Language Models", OSDI '24), which is
start-time fair queueing (Goyal et al., SIGCOMM '96) where the length of what is served is not known
beforehand. It counts seconds of the device instead of tokens: models of all sizes share one device, and a
token of a large one takes a hundred times that of a small one. They are those that the cost model gives each
step, not measured ones: what a tenant is charged does not depend on what ran beside it.

1. What a tenant uses is added to its account, divided by its weight.
2. Who begins to wait is lifted to the least account of those that wait already: idling earns nothing.
3. What is used while nobody waits is free. When all that waited have gone the accounts are even again, since
   nobody had less than it asked for.
4. Of those that wait, all whose accounts are above the least are over their share.

A tenant waits if it has a request that could run now, were there room: what waits for its model to be loaded
waits for the link, not for the others, and earns as little as one that idles.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf, nextafter

TenantName = str | None
"""None is everybody where no API keys are configured."""


class Shares:
    """The accounts of one device, in seconds at weight 1."""

    def __init__(self) -> None:
        self.accounts: dict[TenantName, float] = {}
        """0 where there is none. One below the least of those that wait tells nothing, and is dropped."""
        self._waiting: frozenset[TenantName] = frozenset()

    def charge(self, tenant: TenantName, weight: float, seconds: float) -> None:
        """What a tenant has of a step."""
        if self._waiting:  # 3
            self.accounts[tenant] = self.accounts.get(tenant, 0.0) + seconds / weight

    def wait(self, tenants: Collection[TenantName]) -> None:
        """Exactly these wait from now on."""
        waiting = frozenset(tenants)
        staying = waiting & self._waiting
        self._waiting = waiting
        if not staying:  # 3
            self.accounts.clear()
            return
        least = min(self.accounts.get(tenant, 0.0) for tenant in staying)
        for tenant in waiting - staying:  # 2
            self.accounts[tenant] = max(least, self.accounts.get(tenant, 0.0))
        self.accounts = {t: used for t, used in self.accounts.items() if t in waiting or used > least}

    def over(self, pending: Mapping[TenantName, float], newcomer: TenantName = None) -> frozenset[TenantName]:
        """Who is over its share. `pending` is what engines hold and have not computed, as in accounts.

        With a `newcomer`: who would be if that tenant waited as well, lifted as `wait` does it, and when
        those that are even with it have had the next step.
        """
        accounts = {t: self.accounts.get(t, 0.0) for t in self._waiting}
        if newcomer is not None and accounts:
            least = min(accounts.values())
            accounts.setdefault(newcomer, max(nextafter(least, -inf), self.accounts.get(newcomer, -inf)))
        used = {t: seconds + pending.get(t, 0.0) for t, seconds in accounts.items()}
        least = min(used.values(), default=0.0)  # 4
        return frozenset(tenant for tenant, seconds in used.items() if seconds > least)
