"""Whether others can dial this peer, as others have tried, and what follows from that.

Each asks a few peers of the run to open a connection of their own to where they see it: at the start, when its
addresses change, and every some minutes. Who cannot be dialled says so in its row: it reduces and seals nothing, and
what it contributes counts in full, since it dials the others. A port that is opened later is noticed within
`CLOSED_AGAIN_SECONDS`. One answer is one peer's word: most of those that tried decide, and a verdict changes only when
a second look a moment later says the same. Cost: two or three small calls each time, and a connection of each who is
asked.

Lives on the network thread.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p2ptrain.calls.client import dialled
from p2ptrain.calls.messages import TOO_MANY_CALLS, CallError, Dialled
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.errors import P2PTrainError
from p2ptrain.peer.presence import FRESH_SECONDS
from p2ptrain.swarm.addresses import order_for_dialling
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.limits import Backoff
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.reach import host_and_port

LOOK_SECONDS = 5.0
"""Between two looks at this machine's addresses."""
UNKNOWN_AGAIN_SECONDS, CLOSED_AGAIN_SECONDS, OPEN_AGAIN_SECONDS = 10.0, 60.0, 300.0
"""Between two times that others are asked: nobody has tried yet; nobody gets through; it works."""
SURE_SECONDS = 3.0
"""Before the second look that a change of verdict needs."""
ASKED_AT_ONCE, ASKED_MAX, ANSWERS_WANTED = 3, 9, 2
CONNECT_SECONDS = 3.0
PLACES = 2
"""Relays at which a peer that nobody can dial holds a place."""
PLACE_SECONDS = 600.0
RELAY_AGAIN_SECONDS = 10.0, 300.0
"""The first and the longest pause after a peer that does not relay was asked to."""
PORTS_MAX = 2
"""Tried by each who is asked: a router may show another port than the one that is listened on."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tried:
    """What others found."""

    dialable: bool | None
    """Most of those that tried got through; None: nobody has tried."""
    routes: tuple[str, ...] = ()
    """Those by which somebody got through."""
    seen_at: str = ""
    """The IP address where the others look for this peer, a public one if any of them sees one."""
    why: str = ""
    """What those found who did not get through."""


def conclude(answers: Sequence[Sequence[tuple[int, Dialled]]]) -> Tried:
    """Conclude from what each peer that was asked has answered for each port it was asked for.

    Answers from outside of this network are worth more: who is behind the same router gets through to anybody there.
    """
    told = [
        [(port, answer) for port, answer in one if answer.address and answer.failure != TOO_MANY_CALLS]
        for one in answers
    ]
    told = [one for one in told if one]
    counted = [one for one in told if _is_public(one[0][1].address)] or told
    if not counted:
        return Tried(None)
    through = [[pair for pair in one if not pair[1].failure] for one in counted]
    # Of the port that is listened on, which is asked for last.
    failed = [one[-1][1] for one, good in zip(counted, through, strict=True) if not good]
    routes = dict.fromkeys(_route(answer.address, port) for one in told for port, answer in one if not answer.failure)
    return Tried(
        2 * sum(map(bool, through)) > len(counted),
        tuple(order_for_dialling(list(routes))),
        counted[0][-1][1].address,
        failed[0].failure if failed else "",
    )


def _is_public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def _route(host: str, port: int) -> str:
    return f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}"


class Reachability:
    """See the module docstring.

    Args:
        secret: the manifest's `records_key`.
        announced: the owner has said which addresses lead here.
        say: shows a line to this peer's owner.
    """

    def __init__(
        self,
        node: SwarmNode,
        run_id: bytes,
        secret: bytes,
        *,
        announced: bool,
        say: Callable[[str], None],
    ) -> None:
        self._node, self._run_id, self._secret = node, run_id, secret
        self._announced, self._say = announced, say
        self._visible: list[str] = []
        self._restarts = 0
        self._due, self._unknown_pause = 0.0, UNKNOWN_AGAIN_SECONDS
        self._said: bool | None = None
        #: relay -> until when its reservation is good without asking again, and the addresses that it makes
        self._places: dict[bytes, tuple[float, list[str]]] = {}
        self._relays = Backoff(*RELAY_AGAIN_SECONDS)
        self.tried = Tried(None if node.dialable else False)
        #: what to say of our line depends on it
        self.uplink: UplinkMeter | None = None
        #: full multiaddrs for others: those that were dialled first, public ones before others; empty: nobody can
        self.addresses: list[str] = []
        #: hears that any of this has changed, with the old addresses
        self.on_change: Callable[[list[str]], None] = lambda before: None

    async def check(self) -> None:
        """Look at this machine's addresses, and ask others; twice where that would change what was known."""
        self._visible = await self._node.join_addresses()
        if self._node.dialable:
            tried = await self._ask()
            # At the start a peer that others reach is the usual case.
            expected = self.tried.dialable is not False
            if tried.dialable is not None and tried.dialable != expected:
                await asyncio.sleep(SURE_SECONDS)
                again = await self._ask()
                if again.dialable != tried.dialable:
                    tried = Tried(self.tried.dialable, again.routes or tried.routes, tried.seen_at, tried.why)
            if tried.dialable is not None:
                self.tried = tried
            if self.tried.dialable is False:
                await self._keep_places()
        pause = {None: self._unknown_pause, False: CLOSED_AGAIN_SECONDS, True: OPEN_AGAIN_SECONDS}
        # Alone, or among peers that do not try.
        self._unknown_pause = min(1.5 * self._unknown_pause, CLOSED_AGAIN_SECONDS)
        self._due = time.monotonic() + pause[self.tried.dialable] * random.uniform(0.9, 1.1)
        self._conclude()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self.tried.dialable is False and await self._keep_places():
                self._conclude()
            visible = await self._node.join_addresses()
            changed = set(visible) != set(self._visible) or self._node.restarts != self._restarts
            self._restarts = self._node.restarts
            if changed or time.monotonic() >= self._due:
                await self.check()

    def _conclude(self) -> None:
        before = self.addresses
        if self.tried.dialable is False:
            self.addresses = [address for _, place in self._places.values() for address in place]
        else:
            routes = [address.rpartition("/p2p/")[0] for address in self._visible]
            own = [] if self._announced else self.tried.routes
            ordered = order_for_dialling([*own, *routes])
            self.addresses = [f"{route}/p2p/{format_peer_id(self._node.peer_id)}" for route in ordered]
        if self.uplink is not None:
            self.uplink.dialable = self.tried.dialable is not False
        if self.tried.dialable is not None and self.tried.dialable != self._said and self._node.dialable:
            if not self.tried.dialable:
                self._say(f"others cannot dial this peer: {advice(self.tried, self._port, self._visible)}")
            elif self._said is False:
                self._say("others can dial this peer now: from the next rounds on it reduces and seals")
            self._said = self.tried.dialable
        self.on_change(before)

    async def _keep_places(self) -> bool:
        """Hold places at some relays, which lose them with the connection; say whether that has changed."""
        if not self._node.dialable:
            return False
        before = {relay: place for relay, (_, place) in self._places.items()}
        connected, now = await self._node.connected(), time.monotonic()
        self._places = {
            relay: (due, place) for relay, (due, place) in self._places.items() if relay in connected and now < due
        }
        # Those that were places before come first: others know them.
        candidates = dict.fromkeys([*before, *connected])
        for relay in [relay for relay in candidates if relay not in self._places and self._relays.ready(relay)][:8]:
            if len(self._places) >= PLACES:
                break
            try:
                place = await self._node.reserve(relay)
            except P2PTrainError as error:
                _logger.debug("no place at %s: %s", format_peer_id(relay)[-8:], error)
                self._relays.failed(relay)
                continue
            self._relays.succeeded(relay)
            if place:
                self._places[relay] = now + PLACE_SECONDS, place
        return before != {relay: place for relay, (_, place) in self._places.items()}

    @property
    def _port(self) -> int:
        return self._node.port

    def _ports(self) -> list[int]:
        """Ports to have tried: those of addresses for others, and last the one that is listened on."""
        shown = [host_and_port(address) for address in self._visible]
        shown = [(host, port) for host, port in shown if port and (self._announced or _is_public(host))]
        others = list(dict.fromkeys(port for _, port in shown if port != self._port))
        if self._announced and others and all(port != self._port for _, port in shown):
            # Only what is announced counts: others dial nothing else.
            return others[:PORTS_MAX]
        return [*others[: PORTS_MAX - 1], self._port]

    async def _ask(self) -> Tried:
        """Ask peers of the run until enough have answered."""
        now, me = time.time(), self._node.peer_id
        records = await self._node.read_peers(self._run_id, self._secret)
        fresh = [
            peer for peer, record in records.items() if peer != me and record.last_seen_seconds(now) < FRESH_SECONDS
        ]
        random.shuffle(fresh)
        # Who can be dialled is asked first: it need not be connected already.
        fresh.sort(key=lambda peer: not records[peer].addresses)
        # Places to meet are in no run, and relays may be known by the addresses of others alone.
        others = dict.fromkeys([*reversed(self._node.known_peers), *await self._node.connected()])
        known = [peer for peer in others if peer not in records and peer != me]
        # A seat for one of them: in a run that meets there, all others may see us through a relay.
        asked, ports = [*fresh[: ASKED_AT_ONCE - 1], *known[:1], *fresh[ASKED_AT_ONCE - 1 :], *known[1:]], self._ports()
        asked = asked[:ASKED_MAX]
        answers: list[list[tuple[int, Dialled]]] = []
        while asked and (conclude(answers).dialable is None or len(answers) < ANSWERS_WANTED):
            at_once, asked = asked[:ASKED_AT_ONCE], asked[ASKED_AT_ONCE:]
            found = await asyncio.gather(*(self._ask_one(peer, ports) for peer in at_once))
            answers += [one for one in found if one]
        return conclude(answers)

    async def _ask_one(self, peer: bytes, ports: Sequence[int]) -> list[tuple[int, Dialled]]:
        answers = []
        try:
            await self._node.connect(peer, timeout_seconds=CONNECT_SECONDS)
            for port in ports:
                answers.append((port, await dialled(self._node, peer, port)))
                if not answers[-1][1].failure:
                    break
        except (CallError, P2PTrainError) as error:
            _logger.debug("%s does not try to dial us: %s", format_peer_id(peer)[-8:], error)
        return answers


def advice(tried: Tried, port: int, visible: Sequence[str]) -> str:
    """Say what was found and what to do about it, for a peer that others cannot dial.

    Args:
        port: that this peer listens on.
        visible: addresses of this machine.
    """
    hosts = list(dict.fromkeys(host for host, _ in map(host_and_port, visible) if host))
    local = [host for host in hosts if not _is_loopback(host)]
    here = tried.seen_at in hosts
    what = f"{tried.seen_at}, TCP port {port}: {tried.why}. It trains, its work counts in full, and it reduces nothing."
    if ":" in tried.seen_at or here:
        return f"{what} To change that, allow incoming TCP port {port} in the firewalls of this machine and its router"
    target = next((host for host in local if ":" not in host), "this machine")
    return f"{what} To change that, forward TCP port {port} in the router to {target}, port {port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def where_it_works(address: str) -> str:
    """Say where others can use an address, if not everywhere; else ""."""
    host, _ = host_and_port(address)
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if parsed.is_loopback:
        return "this address works on this machine only"
    if not parsed.is_global:
        return "this address works in this network only; for others, forward a port and give --announce HOST:PORT"
    return ""
