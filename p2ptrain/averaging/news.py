"""News between peers: each follows every other it knows of, and hears its tip at each change and every second.

A sealer's news carry the seal itself. Silence is a peer that is gone, for whoever follows it. Cost: one open stream for
each pair, and one small frame a second on each; above 16 members a tree would do with less (design 4.6).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from p2ptrain.averaging import chain
from p2ptrain.averaging.chain import SealError
from p2ptrain.averaging.client import Client
from p2ptrain.averaging.events import PeerLeft, SealHeard, TipHeard
from p2ptrain.averaging.messages import CallError, News, RefusedError, Tip
from p2ptrain.errors import P2PTrainError
from p2ptrain.swarm.identity import format_peer_id, verify

FOLLOWERS_MAX = 256
FOLLOWED_MAX = 64
NEWS_EVERY_SECONDS = 1.0
QUEUED_MAX = 64
"""News that wait for a follower who does not read; it will ask for rounds later."""
ATTEMPTS = 4
CONNECT_SECONDS = 3.0
RETRY_SECONDS = (0.25, 0.5, 1.0, 2.0)

_logger = logging.getLogger(__name__)

Heard = Callable[[SealHeard | TipHeard | PeerLeft], None]


class NewsFeed:
    """Both ends: those who follow us, and those we follow.

    Args:
        tip: where our chain stands now.
        heard: takes what others say.
    """

    def __init__(self, client: Client, tip: Callable[[], Tip], heard: Heard) -> None:
        self._client, self._tip, self._heard = client, tip, heard
        self._me = client.node.peer_id
        self._followers: dict[bytes, asyncio.Queue[News | None]] = {}
        self._followed: dict[bytes, asyncio.Task[None]] = {}
        self._leaving = False
        #: where others said they stand
        self.tips: dict[bytes, Tip] = {}

    async def close(self) -> None:
        """Say goodbye, and follow nobody any more."""
        self._leaving = True
        for news in self._followers.values():
            news.put_nowait(News(self._tip(), None, True))
            news.put_nowait(None)
        # The followers' streams take their frames in this loop's next turns.
        await asyncio.sleep(0.2 if self._followers else 0)
        tasks = list(self._followed.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- those who follow us ----------------------------------------------------------------------------------

    def refusal(self, peer: bytes) -> str | None:
        """Why a peer may not follow, or None."""
        if peer not in self._followers and len(self._followers) >= FOLLOWERS_MAX:
            return "too many follow this peer already"
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
                try:
                    async with asyncio.timeout(NEWS_EVERY_SECONDS):
                        item = await news.get()
                except TimeoutError:
                    item = News(self._tip(), None, self._leaving)
                if item is None:
                    return
                yield item
        finally:
            self.tips.pop(peer, None)
            if self._followers.get(peer) is news:
                del self._followers[peer]

    def tell(self, seal: chain.SignedSeal | None) -> None:
        """Our tip has changed; `seal`: by a seal of ours."""
        news = News(self._tip(), seal, False)
        for follower in self._followers.values():
            if follower.qsize() < QUEUED_MAX:
                follower.put_nowait(news)

    # ---- those we follow --------------------------------------------------------------------------------------

    def follow(self, peer: bytes) -> None:
        """Keep hearing news of `peer` for as long as it gives any."""
        if peer == self._me or peer in self._followed or len(self._followed) >= FOLLOWED_MAX or self._leaving:
            return
        task = asyncio.create_task(self._listen(peer))
        self._followed[peer] = task
        task.add_done_callback(lambda _: self._followed.pop(peer, None))
        task.add_done_callback(_report)

    def hear_tip(self, peer: bytes, tip: Tip) -> None:
        """A peer said where it stands."""
        self.tips.pop(peer, None)
        self.tips[peer] = tip
        while len(self.tips) > FOLLOWERS_MAX:
            del self.tips[next(iter(self.tips))]
        self._heard(TipHeard(peer, tip.round, tip.id, tip.total))

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
                return
            except CallError as error:
                _logger.debug("no news of %s: %s", format_peer_id(peer)[-8:], error)
            await asyncio.sleep(RETRY_SECONDS[failures])
            failures += 1
            await self.connect(peer)

    def _take(self, peer: bytes, news: News) -> None:
        if news.seal is not None:
            try:
                identifier, seal = chain.open_seal(news.seal, verify)
            except SealError as error:
                _logger.info("%s sent a bad seal: %s", format_peer_id(peer)[-8:], error)
                return
            self._heard(SealHeard(identifier, seal, news.seal, peer))
        self.hear_tip(peer, news.tip)
        if news.leaving:
            self.tips.pop(peer, None)
            self._heard(PeerLeft(peer))


def _report(task: asyncio.Task[None]) -> None:
    """Listening ends quietly or is a fault that must not pass in silence."""
    if not task.cancelled() and task.exception() is not None:
        _logger.error("following a peer has failed", exc_info=task.exception())
