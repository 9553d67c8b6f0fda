"""Say whom or what a peer waits for, in words that a person can act on.

What concerns the machine is for the network thread; it is read, and never changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator

from p2ptrain.peer.driver import RoundDriver
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.records import ID_END

LOOK_SECONDS = 1.0
SAY_AFTER_SECONDS = 10.0
SAY_EVERY_SECONDS = 20.0
LISTED = 4


def awaited(driver: RoundDriver) -> str:
    """Return whom or what this peer waits for to go on, as "the replies of A, B"; peers by the end of their ids."""
    machine = driver.machine
    if machine.fetching.resyncing is not None:
        return f"the state of the swarm, from {_names([machine.fetching.resyncing])}"
    exchange = machine.exchanges.current
    if exchange is None:
        return "nothing: the run's last round is sealed"
    if exchange.index is None:
        if machine.fetching.asked:
            return f"rounds from {_names(machine.fetching.asked)}"
        if not machine.head.round:
            return "the run's first rounds"
        reason = f": {driver.not_admitted}" if driver.not_admitted else ""
        return f"being admitted to the round of {_count(exchange.shape.members)}{reason}"
    if exchange.sent_at is None:
        return "this peer's own gradient"
    left = machine.group.left
    members = {member.peer_id for member in exchange.shape.members}
    late: set[bytes] = set()
    for part in exchange.reducing.values():
        if not part.closed:
            late |= members - part.received.keys() - left - {machine.me}
    if late:
        return f"contributions of {_names(late)}"
    owing = {
        exchange.shape.members[part.reducer].peer_id
        for number, part in enumerate(exchange.shape.parts)
        if number not in exchange.replies
    }
    if owing - {machine.me}:
        return f"replies of {_names(owing - {machine.me})}"
    if owing:
        return "this peer's own sums"
    order = [exchange.shape.members[index].peer_id for index in exchange.shape.sealer_order]
    first = next((peer for peer in order if peer not in left), machine.me)
    return "its own turn to seal the round" if first == machine.me else f"the seal of {_names([first])}"


@contextlib.contextmanager
def told_while(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Say now and then that something that this thread waits for is still under way.

    Args:
        what: it is, as "asking which run there is".
        say: shows a line; on a thread of its own.
    """
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        pause = SAY_AFTER_SECONDS
        while not ended.wait(pause):
            say(f"{what}, since {time.monotonic() - began:.0f} s")
            pause = SAY_EVERY_SECONDS

    thread = threading.Thread(target=tell, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


async def tell_while_waiting(driver: RoundDriver, progress: Callable[[], object], say: Callable[[str], None]) -> None:
    """Say what is waited for where `progress` returns the same for long, until cancelled.

    Args:
        progress: changes with everything that is a step ahead.
        say: shows a line.
    """
    now = asyncio.get_running_loop().time
    seen, since, due = progress(), now(), SAY_AFTER_SECONDS
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        current = progress()
        if current != seen:
            seen, since, due = current, now(), SAY_AFTER_SECONDS
        elif now() - since >= due and not driver.leaving:
            due = now() - since + SAY_EVERY_SECONDS
            head = driver.machine.head.round
            say(f"round {head + 1:,}: waiting since {now() - since:.0f} s for {awaited(driver)}")


def _names(peers: Collection[bytes]) -> str:
    names = [format_peer_id(peer)[-ID_END:] for peer in sorted(peers)]
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _count(members: Collection[object]) -> str:
    return f"{len(members)} member{'' if len(members) == 1 else 's'}"
