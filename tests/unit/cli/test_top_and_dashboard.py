"""What is kept open beside a swarm says what the views say, lets in whom it may, and takes any text of strangers."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from p2ptrain.config.home import Home
from p2ptrain.observe.census import Inspection
from p2ptrain.observe.events import Event, EventLog, Heard, MemberLine, Sealed, Started
from p2ptrain.observe.projection import Projection

ADA, BO = "12D3KooWada", "12D3KooWbo"
NASTY = "<b>\x1b[31mbo"


def written() -> Iterator[Event]:
    """What ada writes down of two rounds with bo, who is lost since."""
    yield (
        Started(
            t=1.0,
            run_id="ab" * 32,
            run="verse",
            peer_id=ADA,
            name="ada",
            device="cpu",
            version="1",
            protocol=10,
            round=0,
            state_id="00" * 32,
            last_round=100,
        )
    )
    for number in (1, 2):
        members = [
            MemberLine(peer_id=ADA, included=True, weight=8, parts=2, owed=0),
            MemberLine(peer_id=BO, included=number == 1, weight=4 if number == 1 else 0, parts=1, owed=number - 1),
        ]
        yield (
            Sealed(
                t=1.0 + number,
                round=number,
                state_id=f"{number:064x}",
                parent=f"{number - 1:064x}",
                total=number,
                sealer=ADA,
                place=number - 1,
                solo=False,
                members=members,
            )
        )
    yield (
        Heard(
            t=4.0,
            peer_id=BO,
            name=NASTY,
            state="lost",
            round=1,
            state_id=f"{1:064x}",
            tokens_per_second=5.0,
            loss=2.0,
            device="cpu",
            version="1",
            path="client",
        )
    )


def seen() -> Inspection:
    """Ada's view of it."""
    projection = Projection()
    for event in written():
        projection.apply(event)
    return projection.moment()


class Source:
    pause_seconds = 3.0

    async def look(self) -> Inspection:
        return seen()

    async def credit(self) -> dict[str, Any]:
        raise RuntimeError("nobody hands out seals")

    async def manifest(self) -> dict[str, Any]:
        return {"manifest": {"name": "verse"}}

    async def history(self) -> dict[str, list[Any]]:
        return {"round": []}

    async def span(self) -> tuple[int, int] | None:
        return (1, 2)

    async def past(self, round: int) -> Inspection | None:
        return seen() if round < 3 else None


@contextmanager
def served(source: Any = None, **settings: Any) -> Iterator[str]:
    """The address of a page with that source."""
    uvicorn = pytest.importorskip("uvicorn", reason="pip install 'p2ptrain[dashboard]'")
    pytest.importorskip("sse_starlette", reason="pip install 'p2ptrain[dashboard]'")
    from p2ptrain.dashboard.app import make_app

    app = make_app(source or Source(), **settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def get(url: str, **headers: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_page_gets_looks_and_the_past_and_nothing_from_elsewhere() -> None:
    with served() as url:
        with urllib.request.urlopen(f"{url}/api/events", timeout=10) as stream:
            lines = [stream.readline().decode().strip() for _ in range(2)]
        assert lines[0] == "event: look"
        look = json.loads(lines[1].removeprefix("data: "))
        assert look["run"]["name"] == "verse" and "lost: " in look["health"]["text"]
        assert [row["round"] for row in look["rounds"]] == [2, 1]
        assert look["rounds"][0]["skipped_parts"] == 1 and look["rounds"][0]["takeover"]
        # In round 1 bo had ada's reply of two parts, and ada bo's of one; in round 2 bo took no part and owed its own.
        assert look["flows"] == {"peers": [NASTY, "ada"], "parts": [[0, 2], [1, 0]]}
        assert get(f"{url}/api/past?round=2")[0] == 200 and get(f"{url}/api/past?round=9")[0] == 404
        assert get(f"{url}/api/past?round=x")[0] == 400
        status, body = get(f"{url}/api/credit")
        assert status == 503 and json.loads(body) == {"error": "nobody hands out seals"}
        page = get(f"{url}/")[1].decode() + get(f"{url}/static/style.css")[1].decode()
        assert "http://" not in page and "https://" not in page and get(f"{url}/static/../app.py")[0] == 404


def test_the_page_of_a_swarm_that_has_ended_shows_it_as_a_home_saw_it_last(tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    from p2ptrain.dashboard.source import HomeSource

    log = EventLog(tmp_path / "events")
    for event in written():
        log.write(event)
    source = HomeSource(Home(tmp_path))
    last, first = asyncio.run(source.look()), asyncio.run(source.past(1))
    assert asyncio.run(source.span()) == (1, 2) and first is not None
    assert [one.round for one in last.rounds] == [1, 2] and [one.round for one in first.rounds] == [1]
    assert last.as_json()["peers"] == seen().as_json()["peers"]


def test_content_is_for_who_has_the_token_and_for_no_other_sites_name() -> None:
    with served(token="secret") as url:
        assert get(f"{url}/")[0] == 200
        for path in ("api/manifest", "api/past", "api/credit", "api/history", "api/events"):
            assert get(f"{url}/{path}")[0] == 403 and get(f"{url}/{path}?token=wrong")[0] == 403
        assert get(f"{url}/api/manifest", Authorization="Bearer secret")[0] == 200
        assert get(f"{url}/api/manifest?token=secret")[0] == 200
    with served(hosts=frozenset({"127.0.0.1"})) as url:
        assert get(f"{url}/api/manifest")[0] == 200
        assert get(f"{url}/api/manifest", Host="evil.example:80")[0] == 403


def test_top_shows_peers_and_rounds_and_sorts_them() -> None:
    pytest.importorskip("textual", reason="pip install 'p2ptrain[top]'")
    from textual.widgets import DataTable, Static

    from p2ptrain.cli.screen import Screen

    async def look() -> Inspection:
        return seen()

    async def scenario() -> None:
        app = Screen(look)
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            await app.look_again()
            peers, rounds = app.query_one("#peers", DataTable), app.query_one("#rounds", DataTable)
            assert {str(peers.get_row_at(n)[2]) for n in range(2)} == {"training", "lost"}
            assert str(rounds.get_row_at(0)[0]) == "2" and str(rounds.get_row_at(0)[4]) == "1/3"
            head = str(app.query_one("#head", Static).render())
            assert "verse  round 2 of 100" in head and "\x1b" not in head
            await pilot.press("s", "r", "p")
            assert not rounds.display and "stands still" in str(app.query_one("#head", Static).render())

    asyncio.run(scenario())
