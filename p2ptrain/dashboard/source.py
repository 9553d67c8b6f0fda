"""What the page shows: a swarm through an observer, and the past from a home's events."""

from __future__ import annotations

import asyncio
from typing import Any

from p2ptrain.config.home import Home
from p2ptrain.observe.census import Inspection
from p2ptrain.observe.events import Event, Measured, Sealed, Worked, read_events
from p2ptrain.observe.projection import moment_at
from p2ptrain.observe.views import manifest_view
from p2ptrain.peer.observing import Observer, names_in

POINTS = 400
"""Of a curve."""


class SwarmSource:
    """A source for `dashboard.app.make_app`.

    Args:
        observer: looks at the swarm.
        home: whose events tell the past; one without any has none.
    """

    def __init__(self, observer: Observer, home: Home) -> None:
        self._observer, self._home = observer, home
        self._seen: Inspection | None = None
        self._counting = asyncio.Lock()

    async def look(self) -> Inspection:
        """Return how the swarm is now."""
        self._seen = await self._observer.look()
        return self._seen

    async def credit(self) -> dict[str, Any]:
        """Return who did how much. Raises CallError: nobody hands out seals."""
        async with self._counting:
            count = await self._observer.credit()
        return count.as_json({} if self._seen is None else names_in(self._seen))

    async def manifest(self) -> dict[str, Any]:
        """Return what all agreed on."""
        return manifest_view(self._observer.manifest, self._observer.run_id)

    async def history(self) -> dict[str, list[Any]]:
        """Return the curves that the home's events tell: of some rounds, the last of equal steps, `POINTS` at most."""
        events = await asyncio.to_thread(self._events)
        worked = {event.round: event for event in events if isinstance(event, Worked)}
        measured = {event.round: event.figures for event in events if isinstance(event, Measured)}
        rounds = sorted(worked)
        rounds = rounds[len(rounds) - 1 :: -max(1, -(-len(rounds) // POINTS))][::-1] if rounds else []
        return {
            "round": rounds,
            "train_loss": [worked[number].loss for number in rounds],
            "tokens_per_second": [worked[number].tokens_per_second for number in rounds],
            "heldout_round": sorted(measured),
            "heldout": [next(iter(measured[number].values()), None) for number in sorted(measured)],
        }

    async def span(self) -> tuple[int, int] | None:
        """Return the first and the last round that the home's events tell of."""
        events = await asyncio.to_thread(self._events)
        rounds = [event.round for event in events if isinstance(event, Sealed)]
        return (min(rounds), max(rounds)) if rounds else None

    async def past(self, round: int) -> Inspection | None:
        """Return how the swarm was when this round was sealed."""
        projection = await asyncio.to_thread(lambda: moment_at(self._events(), round))
        return None if projection.own is None else projection.moment()

    def _events(self) -> list[Event]:
        return list(read_events(self._home.events))
