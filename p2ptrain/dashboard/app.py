"""A page that shows a swarm: it draws what the views say, and works nothing out.

The page gets a look every three seconds by server-sent events, and asks for credit and past moments when it shows them.
Nothing on it comes from elsewhere: scripts and charts are files beside this one. Where it listens on more than this
machine, content is for those who have the token that stands in the page's address, and in no cookie.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from p2ptrain.observe.census import Inspection
from p2ptrain.observe.views import round_row

ROUNDS_SHOWN = 40
POINTS_SHOWN = 512
READERS_MAX = 32
"""Pages that may be open at once."""
STATIC = Path(__file__).parent / "static"
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]

_logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where the page's content comes from."""

    @property
    def pause_seconds(self) -> float:
        """Before the next look."""

    async def look(self) -> Inspection:
        """Return how the swarm is now."""

    async def credit(self) -> dict[str, Any]:
        """Return who did how much."""

    async def manifest(self) -> dict[str, Any]:
        """Return what all agreed on."""

    async def history(self) -> dict[str, list[Any]]:
        """Return the curves of one peer, of as many rounds as are known: equally long lists by name."""

    async def span(self) -> tuple[int, int] | None:
        """Return the first and the last round that can be replayed; None: none can."""

    async def past(self, round: int) -> Inspection | None:
        """Return how the swarm was when this round was sealed; None: it is not known."""


def page_of(seen: Inspection) -> dict[str, Any]:
    """Return what the page draws of one look."""
    names = {peer["peer_id"]: peer["name"] for peer in seen.peers}
    rows = [round_row(sealed, names) for sealed in list(seen.rounds)[-ROUNDS_SHOWN:]]
    return seen.as_json() | {"rounds": rows[::-1], "flows": flows_of(seen), "points": points_of(seen)}


def points_of(seen: Inspection) -> dict[str, list[int]]:
    """Return what the charts of rounds draw: of each round, by its number."""
    rounds = list(seen.rounds)[-POINTS_SHOWN:]
    return {
        "round": [sealed.round for sealed in rounds],
        "members": [len(sealed.members) for sealed in rounds],
        "included": [sum(member.included for member in sealed.members) for sealed in rounds],
        "sequences": [sum(member.weight for member in sealed.members) for sealed in rounds],
        "skipped": [sum(member.owed for member in sealed.members) for sealed in rounds],
    }


def flows_of(seen: Inspection) -> dict[str, Any]:
    """Return who exchanges how much with whom, in parts over the rounds shown: each member that was included sent each
    part to its reducer and had its reply."""
    names = {peer["peer_id"]: peer["name"] for peer in seen.peers}
    counts: dict[tuple[str, str], int] = {}
    for sealed in list(seen.rounds)[-ROUNDS_SHOWN:]:
        for sender in sealed.members:
            for reducer in sealed.members:
                answered = reducer.parts - reducer.owed
                if sender.included and answered and sender.peer_id != reducer.peer_id:
                    key = (sender.peer_id, reducer.peer_id)
                    counts[key] = counts.get(key, 0) + answered
    peers = sorted({peer for pair in counts for peer in pair}, key=lambda peer: (names.get(peer, "~"), peer))[:32]
    return {
        "peers": [names.get(peer) or peer[-8:] for peer in peers],
        "parts": [[counts.get((sender, reducer), 0) for reducer in peers] for sender in peers],
    }


class _Guard:
    """Lets in whoever has the token, where there is one, and sets headers that keep the page to itself."""

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.query_params.get("token") or request.headers.get("authorization", "").removeprefix("Bearer ")
        host = request.headers.get("host", "").rpartition(":")[0]
        is_data = request.url.path.startswith("/api/")
        response: Response | None = None
        if self._hosts and host not in self._hosts:
            # Another site's name that leads here would have a browser read the page for that site.
            response = JSONResponse({"error": "this page is for this machine"}, 403)
        elif self._token and is_data and not hmac.compare_digest(given.encode(), self._token.encode()):
            response = JSONResponse({"error": "the token is missing or wrong: take the whole address"}, 403)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await (response or self._app)(scope, receive, with_headers)


def make_app(source: Source, *, token: str = "", hosts: frozenset[str] = frozenset()) -> Starlette:
    """Return the page as an ASGI application.

    Args:
        token: without which no content is handed out; empty: everybody may see it.
        hosts: names by which the page may be asked for; none: any.
    """
    board = _Board(source)

    async def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def events(request: Request) -> Response:
        if board.readers >= READERS_MAX:
            return JSONResponse({"error": "too many pages are open"}, 429)
        return EventSourceResponse(board.follow())

    async def credit(request: Request) -> Response:
        return await _answered(source.credit)

    async def manifest(request: Request) -> Response:
        return await _answered(source.manifest)

    async def history(request: Request) -> Response:
        return await _answered(source.history)

    async def past(request: Request) -> Response:
        text = request.query_params.get("round", "")
        if not text:
            span = await source.span()
            return JSONResponse({"span": span})
        if not text.isdecimal() or len(text) > 15:
            return JSONResponse({"error": "round is no number"}, 400)
        seen = await source.past(int(text))
        if seen is None:
            return JSONResponse({"error": f"nothing is known of round {text}"}, 404)
        return JSONResponse(page_of(seen))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        looking = asyncio.create_task(board.run())
        try:
            yield
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking

    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/events", events),
            Route("/api/credit", credit),
            Route("/api/manifest", manifest),
            Route("/api/history", history),
            Route("/api/past", past),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(_Guard, token=token, hosts=hosts)],
        lifespan=lifespan,
    )


async def _answered(ask: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    try:
        return JSONResponse(await ask())
    except Exception as error:
        _logger.debug("a view cannot be had", exc_info=True)
        return JSONResponse({"error": str(error) or type(error).__name__}, 503)


class _Board:
    """The newest look, for all pages that are open; nobody looks where nobody reads."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._newest: Mapping[str, Any] | None = None
        self._changed = asyncio.Condition()
        self._wanted = asyncio.Event()
        self.readers = 0

    async def run(self) -> None:
        """Look again and again, while somebody reads; until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._wanted.wait()
            began = clock()
            try:
                newest = page_of(await self._source.look())
            except Exception as error:
                _logger.warning("a look at the swarm has failed: %r", error)
            else:
                async with self._changed:
                    self._newest = newest
                    self._changed.notify_all()
            await asyncio.sleep(max(0.2, self._source.pause_seconds - (clock() - began)))

    async def follow(self) -> AsyncIterator[dict[str, str]]:
        """Yield the newest look and each that follows."""
        self.readers += 1
        self._wanted.set()
        shown = None
        try:
            while True:
                async with self._changed:
                    while self._newest is None or self._newest is shown:
                        await self._changed.wait()
                    shown = self._newest
                yield {"event": "look", "data": json.dumps(shown)}
        finally:
            self.readers -= 1
            if not self.readers:
                self._wanted.clear()
