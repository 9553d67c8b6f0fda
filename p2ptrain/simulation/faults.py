"""What befalls simulated peers: one fault after another, of kinds and at times that the seed decides."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from p2ptrain.simulation.network import Faulty

if TYPE_CHECKING:
    from p2ptrain.simulation.peer import SimPeer
    from p2ptrain.simulation.world import World

FAULTS = (
    "crash",
    "wipe",
    "freeze",
    "daemon",
    "split",
    "halves",
    "isolate",
    "one_way",
    "slow",
    "late",
    "truncate",
    "repeat",
)
"""
crash: a peer dies before or after some effect or write, and comes back from its disk. wipe: it comes back as another,
with nothing. freeze: it is stopped, then goes on with late timers. daemon: its libp2p daemon dies and is restarted.
split, halves, isolate, one_way: links are cut, between two groups, two equal ones, one peer and all, in one direction.
slow: a peer's line gets a tenth as fast, its delay ten times as long. late, truncate, repeat: streams go wrong.
"""
CORRUPT = "corrupt"
"""A replica gets a wrong bit. Not with the others: roots find it where most members are right and there. Nobody else
crashes meanwhile, and only a member of three or more that live goes wrong."""
GUESTS = "guests"
"""A guest comes by an invitation; after a while the owner shuts it out again, most of the time. Not with the others, as
it takes a run that is not open."""
MEAN_SECONDS_BETWEEN = 5.0


class Faults:
    """Makes them happen in a world until it is cancelled."""

    def __init__(self, world: World) -> None:
        self._world, self._random = world, world.random
        self._names = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []
        self._slowed: list[SimPeer] = []

    async def run(self) -> None:
        """Forever."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            name: getattr(self, f"_{name}") for name in (*FAULTS, CORRUPT, GUESTS)
        }
        wanted = [name for name in kinds if name in self._world.scenario.faults]
        if not wanted:
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(self._random.expovariate(1 / MEAN_SECONDS_BETWEEN))
            name = self._random.choice(wanted)
            self._world.note("", f"fault {name}")
            self._world.report.coverage[f"fault_{name}"] += 1
            self._tasks.append(asyncio.get_running_loop().create_task(kinds[name]()))  # type: ignore[arg-type]

    async def heal_all(self) -> None:
        """Everything is well again, and everyone is there."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        world = self._world
        world.network.cut.clear()
        world.network.faulty = Faulty()
        for peer in world.peers:
            if peer.alive:
                peer.dies_after = None
                peer.thaw()
                if not peer.node.up:
                    peer.daemon_back()
            elif not peer.gone:
                peer.start()
        world.bury_revoked()

    def _some(self) -> SimPeer | None:
        there = [peer for peer in self._world.peers if peer.running]
        return self._random.choice(there) if there else None

    @property
    def _corrupt_one(self) -> SimPeer | None:
        return next((peer for peer in self._world.peers if peer.corrupt and not peer.gone), None)

    # ---- peers ------------------------------------------------------------------------------------------------

    async def _crash(self) -> None:
        peer = self._some()
        if peer is None or (self._corrupt_one is not None and self._corrupt_one is not peer):
            return
        # Somewhere in what it does next, or right now.
        peer.dies_after = self._random.choice((0, self._random.randrange(60)))
        life = peer.lives
        for _ in range(40):
            await asyncio.sleep(0.25)
            if not peer.alive:
                break
        if peer.alive and peer.lives == life:
            peer.die()
        await asyncio.sleep(self._random.choice((0.2, 3.0, self._random.uniform(0.0, 25.0))))
        if not peer.alive and not peer.gone:
            peer.start()

    async def _wipe(self) -> None:
        peer = self._some()
        if peer is None or not any(p.total and not p.gone for p in self._world.peers if p is not peer):
            return  # nobody else holds the chain
        peer.die()
        peer.gone = True
        fresh = self._world.add_peer(len(self._world.peers), f"{peer.name}-w{next(self._names)}")
        fresh.dialable = peer.dialable
        await asyncio.sleep(self._random.uniform(0.5, 5.0))
        fresh.start()

    async def _freeze(self) -> None:
        peer = self._some()
        if peer is None:
            return
        peer.freeze()
        await asyncio.sleep(self._random.choice((1.5, self._random.uniform(1.0, 60.0))))
        peer.thaw()

    async def _daemon(self) -> None:
        peer = self._some()
        if peer is None:
            return
        life = peer.lives
        self._world.network.remove(peer.node)
        await asyncio.sleep(self._random.uniform(0.3, 4.0))
        if peer.alive and peer.lives == life:
            peer.daemon_back()

    async def _corrupt(self) -> None:
        peer = self._some()
        shape = peer.machine.shape if peer is not None else None
        well = {p.id for p in self._world.peers if p.running and p.dies_after is None}
        outvoted = shape is not None and len(shape.members) >= 3 and all(m.peer_id in well for m in shape.members)
        if peer is not None and outvoted and self._corrupt_one is None:
            peer.trainer.replica.go_wrong()

    async def _guests(self) -> None:
        world, guest = self._world, self._world.add_peer(len(self._world.peers), f"g{next(self._names)}")
        guest.start()
        await asyncio.sleep(self._random.uniform(5.0, 40.0))
        if self._random.random() < 0.75:
            await world.revoke(guest)

    # ---- links ------------------------------------------------------------------------------------------------

    async def _cut_for_a_while(self, pairs: list[tuple[bytes, bytes]]) -> None:
        cut = self._world.network.cut
        cut.update(pairs)
        await asyncio.sleep(self._random.choice((2.0, self._random.uniform(1.0, 30.0))))
        cut.difference_update(pairs)

    async def _split(self) -> None:
        peers = [p for p in self._world.peers if not p.gone]
        side = [p for p in peers if self._random.random() < 0.5]
        await self._cut_for_a_while(_between(side, [p for p in peers if p not in side]))

    async def _halves(self) -> None:
        peers = [p for p in self._world.peers if p.running]
        self._random.shuffle(peers)
        half = len(peers) // 2
        if half and len(peers) % 2 == 0:
            self._world.report.coverage["even_splits"] += 1
        await self._cut_for_a_while(_between(peers[:half], peers[half:]))

    async def _isolate(self) -> None:
        peer = self._some()
        if peer is not None:
            await self._cut_for_a_while(_between([peer], [p for p in self._world.peers if p is not peer]))

    async def _one_way(self) -> None:
        there = [p for p in self._world.peers if p.running]
        if len(there) > 1:
            one, other = self._random.sample(there, 2)
            await self._cut_for_a_while([(one.id, other.id)])

    async def _slow(self) -> None:
        peer = self._some()
        if peer is None or peer in self._slowed:
            return
        self._slowed.append(peer)
        line = peer.line
        line.up, line.down = line.up / 10, line.down / 10
        links = [link for (a, b), link in self._world.network.links.items() if peer.id in (a, b)]
        for link in links:
            link.delay_seconds *= 10
        try:
            await asyncio.sleep(self._random.uniform(3.0, 20.0))
        finally:
            line.up, line.down = line.up * 10, line.down * 10
            line.up_free_at = line.down_free_at = 0.0
            for link in links:
                link.delay_seconds /= 10
            self._slowed.remove(peer)

    # ---- streams ----------------------------------------------------------------------------------------------

    async def _late(self) -> None:
        await self._streams("late", 0.02)

    async def _truncate(self) -> None:
        await self._streams("truncated", 0.2)

    async def _repeat(self) -> None:
        await self._streams("repeated", 0.5)

    async def _streams(self, name: str, share: float) -> None:
        faulty = self._world.network.faulty
        setattr(faulty, name, share)
        await asyncio.sleep(self._random.uniform(3.0, 15.0))
        setattr(faulty, name, 0.0)


def _between(one: list[SimPeer], other: list[SimPeer]) -> list[tuple[bytes, bytes]]:
    """All links between two groups, both ways."""
    return [pair for a in one for b in other for pair in ((a.id, b.id), (b.id, a.id))]
