"""News between peers: each follows others, and hears their tips at each change and every second or two.

A sealer's news carry the seal itself; in a large group it goes down a tree instead, each peer passing it on, and peers
follow only some of the members (`relay.py`). Silence is a peer that is gone, for whoever follows it. Cost: one open
stream for each pair that follows, and one small frame every second or two on each; a large group's seal costs each at
most `FAN_OUT` calls, and their bytes.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from p2ptrain import chain
from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import NOT_LISTED, TOO_MANY_CALLS, TOO_MANY_FOLLOWERS, CallError, News, RefusedError, Tip
from p2ptrain.chain import Member, Seal, SealError, SignedSeal, relay
from p2ptrain.errors import P2PTrainError
from p2ptrain.rounds.events import PeerLeft, SealHeard, TipHeard
from p2ptrain.swarm.identity import format_peer_id, verify
from p2ptrain.swarm.limits import Allowance, once_a_minute
from p2ptrain.swarm.tasks import cancel_and_wait, failure_logged

FOLLOWERS_MAX = 256
FOLLOWED_MAX = 64
NEWS_EVERY_SECONDS, NEWS_EVERY_SECONDS_MAX, NEWS_EACH_SECONDS = 1.0, 2.0, 0.25
"""Between two frames when nothing happens: with more followers more, at so much for each, within bounds."""
QUEUED_MAX = 64
"""News that wait for a follower who does not read; it will ask for rounds later."""
ATTEMPTS = 4
CONNECT_SECONDS = 3.0
RETRY_SECONDS = (0.25, 0.5, 1.0, 2.0)
SEALS_REMEMBERED = 32
"""That were passed on, and are not again."""
SEALS_PER_SECOND, SEALS_BURST = 10.0, 2.0 * QUEUED_MAX
"""Of one peer, to be verified."""

_logger = logging.getLogger(__name__)
_failure_logged = failure_logged(_logger, "following a peer has failed")

Heard = Callable[[SealHeard | TipHeard | PeerLeft], None]


def pause_of(followers: int) -> float:
    """Return after how many seconds without news each of so many followers has a frame all the same."""
    return min(max(NEWS_EVERY_SECONDS, NEWS_EACH_SECONDS * followers), NEWS_EVERY_SECONDS_MAX)


class NewsFeed:
    """Both ends: those who follow us, and those we follow.

    Args:
        tip: where our chain stands now.
        heard: takes what others say.
        audience: the members that a seal is for, where it continues our chain or is its head; else nobody.
        admits: which peers the run is for now; no other is followed, and none goes on hearing news.
        refused: hears of peers that refuse us as an outsider.
    """

    def __init__(
        self,
        client: Client,
        tip: Callable[[], Tip],
        heard: Heard,
        audience: Callable[[bytes, Seal], Sequence[Member]],
        admits: Callable[[bytes], bool] = lambda peer: True,
        refused: Callable[[bytes], None] = lambda peer: None,
    ) -> None:
        self._client, self._tip, self._heard, self._audience = client, tip, heard, audience
        self._admits, self._refused = admits, refused
        self._me = client.node.peer_id
        self._followers: dict[bytes, asyncio.Queue[News | None]] = {}
        self._followed: dict[bytes, asyncio.Task[None]] = {}
        self._leaving = False
        #: members, and those of them that we follow
        self._group: frozenset[bytes] = frozenset()
        self._near: frozenset[bytes] = frozenset()
        #: ids of seals passed on
        self._passed_on: deque[bytes] = deque(maxlen=SEALS_REMEMBERED)
        self._passing: set[asyncio.Task[None]] = set()
        self._seals, self._lines = Allowance(SEALS_PER_SECOND, SEALS_BURST), once_a_minute()
        #: where others said they stand
        self.tips: dict[bytes, Tip] = {}
        #: the furthest round that anyone ever said it has
        self.furthest = 0
        #: the loop's time when one who has any round was there last
        self.heard_at = -math.inf

    async def close(self) -> None:
        """Say goodbye, and follow nobody any more."""
        self._leaving = True
        for news in self._followers.values():
            news.put_nowait(News(self._tip(), None, True))
            news.put_nowait(None)
        # The followers' streams take their frames in this loop's next turns.
        await asyncio.sleep(0.2 if self._followers else 0)
        await cancel_and_wait([*self._followed.values(), *self._passing])

    # ---- those who follow us ----------------------------------------------------------------------------------

    def refusal(self, peer: bytes) -> str | None:
        """Why a peer may not follow, or None."""
        if peer not in self._followers and peer not in self._group and len(self._followers) >= FOLLOWERS_MAX:
            return TOO_MANY_FOLLOWERS
        return None

    async def serve(self, peer: bytes) -> AsyncIterator[News]:
        """What a follower hears until it hangs up, follows anew, or we leave."""
        previous = self._followers.pop(peer, None)
        if previous is not None:
            previous.put_nowait(None)
        news: asyncio.Queue[News | None] = asyncio.Queue()
        self._followers[peer] = news
        try:
            yield News(self._tip(), None, False)
            while True:
                # It is connected, for all that we can tell. Once listening to it had failed, nothing else would begin
                # anew with a peer that cannot be dialled and calls nobody, as it seals alone.
                self.follow(peer)
                try:
                    async with asyncio.timeout(pause_of(len(self._followers))):
                        item = await news.get()
                except TimeoutError:
                    item = News(self._tip(), None, self._leaving)
                if item is None or not self._admits(peer):
                    return
                yield item
        finally:
            self.tips.pop(peer, None)
            if self._followers.get(peer) is news:
                del self._followers[peer]

    def tell(self, seal: chain.SignedSeal | None) -> None:
        """Our tip has changed; `seal`: by a seal of ours."""
        whole, bare = News(self._tip(), seal, False), News(self._tip(), None, False)
        large = relay.relayed(self._group)
        for peer, follower in self._followers.items():
            if follower.qsize() < QUEUED_MAX:
                # Members of a large group have the seal from the tree.
                follower.put_nowait(bare if large and peer in self._group else whole)

    # ---- the tree ---------------------------------------------------------------------------------------------

    def pass_on(self, identifier: bytes, seal: Seal, signed: SignedSeal) -> None:
        """Send a seal to those below us in its sealer's tree, once, where the group is so large that it needs one."""
        members = self._audience(identifier, seal)
        if not relay.relayed(members) or identifier in self._passed_on or self._leaving:
            return
        self._passed_on.append(identifier)
        order = relay.tree(members, seal.sealer)
        if self._me in order:
            self._pass_below(order, order.index(self._me), signed)

    def take_relayed(self, peer: bytes, tip: Tip, signed: SignedSeal) -> None:
        """A peer has passed a seal on to us."""
        heard = self._open(peer, signed)
        if heard is not None:
            self.pass_on(heard.id, heard.seal, signed)
            self._heard(heard)
            self.hear_tip(peer, tip)

    def _pass_below(self, order: Sequence[bytes], position: int, signed: SignedSeal) -> None:
        for below in relay.branches(position, len(order)):
            task = asyncio.create_task(self._pass_to(order, below, signed))
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)
            task.add_done_callback(_failure_logged)

    async def _pass_to(self, order: Sequence[bytes], position: int, signed: SignedSeal) -> None:
        try:
            await self._client.relay(order[position], self._tip(), signed)
        except CallError as error:
            _logger.debug("no seal for %s: %s", format_peer_id(order[position])[-8:], error)
            # Those below it are ours to tell.
            self._pass_below(order, position, signed)

    def _open(self, peer: bytes, signed: SignedSeal) -> SealHeard | None:
        if not self._seals.take(peer):
            return None
        try:
            identifier, seal = chain.open_seal(signed, verify)
        except SealError as error:
            if self._lines.take(peer):
                _logger.info("%s sent a bad seal: %s", format_peer_id(peer)[-8:], error)
            return None
        return SealHeard(identifier, seal, signed, peer)

    # ---- those we follow --------------------------------------------------------------------------------------

    def follow(self, peer: bytes) -> None:
        """Keep hearing news of `peer` for as long as it gives any; of members of a large group, of the near ones."""
        if not self.would_follow(peer):
            return
        task = asyncio.create_task(self._listen(peer))
        self._followed[peer] = task
        task.add_done_callback(lambda _: self._followed.pop(peer, None))
        task.add_done_callback(_failure_logged)

    def would_follow(self, peer: bytes) -> bool:
        """Whether `follow` would begin to; there is always room for members that are near."""
        full = len(self._followed) >= FOLLOWED_MAX and peer not in self._near
        unwanted = peer == self._me or peer in self._followed or full or self._leaving or self._is_far(peer)
        return not unwanted and self._admits(peer)

    def is_member(self, peer: bytes) -> bool:
        """Whether `peer` is a member now."""
        return peer in self._group

    def follow_group(self, members: Sequence[Member]) -> None:
        """These are the members now: follow those of them that are near, and no others of them."""
        self._group = frozenset(member.peer_id for member in members)
        self._near = relay.neighbours(members, self._me)
        for peer in [peer for peer in self._followed if self._is_far(peer) or not self._admits(peer)]:
            self._followed[peer].cancel()
        for peer in sorted(self._near):
            self.follow(peer)

    def _is_far(self, peer: bytes) -> bool:
        return peer in self._group and peer not in self._near

    def hear_tip(self, peer: bytes, tip: Tip) -> None:
        """A peer said where it stands."""
        self.tips.pop(peer, None)
        self.tips[peer] = tip
        while len(self.tips) > FOLLOWERS_MAX:
            del self.tips[next(iter(self.tips))]
        if tip.round:
            # Newcomers that hear each other are not what a newcomer waits for.
            self.furthest = max(self.furthest, tip.round)
            self._note_life()
        self._heard(TipHeard(peer, tip.round, tip.id, tip.total))

    def _note_life(self) -> None:
        self.heard_at = asyncio.get_running_loop().time()

    async def connect(self, peer: bytes) -> None:
        """Try to be connected to `peer`."""
        try:
            await self._client.node.connect(peer, timeout_seconds=CONNECT_SECONDS)
        except P2PTrainError as error:
            _logger.debug("no connection to %s: %s", format_peer_id(peer)[-8:], error)

    async def _listen(self, peer: bytes) -> None:
        """Ends after some attempts in vain; whoever hears of that peer again begins anew."""
        failures = 0
        while failures < ATTEMPTS:
            try:
                async for news in self._client.follow(peer, self._tip()):
                    failures = 0
                    self._take(peer, news)
                    if news.leaving:
                        return
            except RefusedError as error:
                _logger.debug("%s cannot be followed: %s", format_peer_id(peer)[-8:], error)
                if str(error) in (TOO_MANY_CALLS, TOO_MANY_FOLLOWERS):
                    self._note_life()
                if str(error) == NOT_LISTED:
                    self._refused(peer)
                await asyncio.sleep(RETRY_SECONDS[-1])
                return
            except CallError as error:
                _logger.debug("no news of %s: %s", format_peer_id(peer)[-8:], error)
            await asyncio.sleep(RETRY_SECONDS[failures])
            failures += 1
            await self.connect(peer)
        if peer not in self._followers:
            # Nothing says any more that it stands anywhere.
            self.tips.pop(peer, None)

    def _take(self, peer: bytes, news: News) -> None:
        if news.seal is not None:
            heard = self._open(peer, news.seal)
            if heard is None:
                return
            self._heard(heard)
        self.hear_tip(peer, news.tip)
        if news.leaving:
            self.tips.pop(peer, None)
            self._heard(PeerLeft(peer))
