"""What the page shows: a swarm through an observer, and the past from a home's events."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import open_manifest
from p2ptrain.observe.census import Inspection
from p2ptrain.observe.credit import count_in
from p2ptrain.observe.events import Event, Measured, Sealed, Worked, read_events
from p2ptrain.observe.projection import moment_at, names_of
from p2ptrain.observe.views import manifest_view
from p2ptrain.peer.observing import Observer, names_in

POINTS = 400
"""Of a curve."""


class Past:
    """What the events of one peer tell of the past.

    Args:
        folder: of events; None: nothing is known of the past.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    async def history(self) -> dict[str, list[Any]]:
        """Return the curves that events tell: of some rounds, the last of equal steps, `POINTS` at most."""
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
        """Return the first and the last round that events tell of."""
        events = await asyncio.to_thread(self._events)
        rounds = [event.round for event in events if isinstance(event, Sealed)]
        return (min(rounds), max(rounds)) if rounds else None

    async def past(self, round: int) -> Inspection | None:
        """Return how the swarm was when this round was sealed."""
        projection = await asyncio.to_thread(lambda: moment_at(self._events(), round))
        return None if projection.own is None else projection.moment()

    def _events(self) -> list[Event]:
        return [] if self._folder is None else list(read_events(self._folder))


class HomeSource(Past):
    """A source for `dashboard.app.make_app` of a swarm of which nobody is there any more: all from one peer's home.

    Args:
        home: of a peer that has trained.
    """

    pause_seconds = 3.0

    def __init__(self, home: Home) -> None:
        super().__init__(home.events)
        self._home = home
        self._last: Inspection | None = None

    async def look(self) -> Inspection:
        """Return how the swarm was when the peer wrote down its last event."""
        if self._last is None:
            self._last = await asyncio.to_thread(lambda: moment_at(self._events()).moment())
        return self._last

    async def credit(self) -> dict[str, Any]:
        """Return who did how much, by the seals in the home."""

        def count() -> dict[str, Any]:
            manifest, _ = open_manifest(self._home.manifest.read_bytes())
            return count_in(self._home.seals, manifest).as_json(names_of(self._home.events))

        return await asyncio.to_thread(count)

    async def manifest(self) -> dict[str, Any]:
        """Return what all agreed on."""
        return manifest_view(*open_manifest(self._home.manifest.read_bytes()))


class SwarmSource(Past):
    """A source for `dashboard.app.make_app` of a swarm that is there.

    Args:
        observer: looks at the swarm; the past is that of its home.
    """

    def __init__(self, observer: Observer) -> None:
        super().__init__(None if observer.home is None else observer.home.events)
        self._observer = observer
        self._seen: Inspection | None = None
        self._counting = asyncio.Lock()

    @property
    def pause_seconds(self) -> float:
        """Before the next look."""
        return self._observer.pause_seconds

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
