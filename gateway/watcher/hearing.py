"""When the kernel is to tell of each connection's beginning, and when of ends alone. Pure.

As soon as anybody on a machine listens for beginnings, in whichever network namespace, the kernel makes an event for
each connection of all namespaces, while the packet that opens it waits: a fifth of what a new connection costs. So
beginnings are learned from dumps and from ends (see ``gateway.watcher.ledger``) where that does as well:

* A dump that takes little comes often, and tells soon enough.
* Of very many beginnings the watcher could not hear in time either.

In between, where dumps are far apart, each beginning is heard of: else it would be told late which connections live.
"""

from __future__ import annotations

SOON = 5_000_000
"""Microseconds from one dump to the next at which dumps alone will do."""
MOST = 10_000
"""Beginnings a second that are heard of on the long run."""
BURST = 20_000
"""And at once."""


class Hearing:
    """Decides from what has been counted; times are microseconds of a clock that does not jump."""

    def __init__(self) -> None:
        self.on = False
        """Whether beginnings are worth their events."""
        self.flooded = False
        """Whether there are too many."""
        self._waiting = 0.0
        """How many of them have come beyond what is heard of on the long run."""
        self._heard = self._begun = 0
        self._heard_at = self._dumped_at = 0

    def heard(self, beginnings: int, now: int) -> None:
        """So many events of beginnings have come until now."""
        passed = (now - self._heard_at) * MOST / 1e6
        self._waiting = max(0.0, self._waiting - passed) + beginnings - self._heard
        self._heard, self._heard_at = beginnings, now
        if self._waiting > BURST:
            self.on, self.flooded = False, True

    def dumping(self, until_next: int) -> None:
        """A dump is under way; after what it has taken so far, until the next one it would take so long.

        Who begins to listen only at its end knows nothing of those that begin behind its back.
        """
        if until_next > SOON and not self.flooded:
            self.on = True

    def dumped(self, begun: int, until_next: int, now: int) -> None:
        """A dump has ended: so many connections have begun until now; until the next one it takes so long."""
        self.flooded = (begun - self._begun) * 1e6 > MOST * (now - self._dumped_at)
        self.on = until_next > SOON and not self.flooded
        self._begun, self._dumped_at, self._waiting = begun, now, 0.0
