"""When the chains that follow behind the maps are made good: soon, all at once, and at the latest after a second.

Nothing here touches the kernel; the writer does, when it is told that it is time.
"""

from __future__ import annotations

from gateway.ports import Clock

SOON = 0.1
"""Seconds without a further change after which the chains follow."""
AT_LATEST = 0.8
"""Seconds after the first change; what is left of the second is for the edit itself."""
AGAIN = 1.0
"""Seconds until a failed try is repeated."""


class Chase:
    """Whether the chains are behind, since when, and whether they failed to follow. For the writer's thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since: float | None = None
        self._at = 0.0
        self._failed = False

    @property
    def behind(self) -> bool:
        """Whether the chains lack a change that the maps have."""
        return self._since is not None

    @property
    def failed(self) -> bool:
        """Whether the last try to make them follow failed."""
        return self._failed

    def note(self, *, behind: bool) -> None:
        """A transaction has ended, and the chains are behind, or they are not."""
        if not behind:
            self._since, self._failed = None, False
            return
        now = self._clock.monotonic()
        self._since = now if self._since is None else self._since
        if not self._failed:
            self._at = min(now + SOON, self._since + AT_LATEST)

    def fail(self) -> None:
        """The chains could not be made to follow."""
        self._failed = True
        self._at = self._clock.monotonic() + AGAIN

    def wait(self) -> float | None:
        """Seconds until ``due``; None where nothing is behind."""
        return None if self._since is None else max(0.0, self._at - self._clock.monotonic())

    def due(self) -> bool:
        """Whether the chains shall follow now."""
        return self.wait() == 0.0
