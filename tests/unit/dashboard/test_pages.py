"""Every page, drawn by a real browser from a home's past, fits its window, has names and contrast, and prints no error.

What is drawn is ninety recorded rounds of real peers, with a peer that is lost, one that is paused and texts as
strangers may choose them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
sys.path.insert(0, str(Path(__file__).parents[1] / "observe"))
sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from screenshots import NO_BROWSER, SCHEMES, SIZES, VIEWS, browser_program, take
from test_seals_and_events import RECORDED, kept, recorded, told
from test_top_and_dashboard import served

from p2ptrain.config.home import Home
from p2ptrain.observe.events import Event, EventLog, Heard, Measured, Started, Worked

LONG = "a name of sixty-four characters, which a person may well choose!"
HTML = "<img src=x onerror=console.error(1)>"


def past() -> Iterator[Event]:
    """What the first of the recorded peers might have written down."""
    manifest, run_id, *_ = recorded()
    rounds = told()
    ids = [row.peer_id for row in rounds[-1].members]
    beginning = Started(
        t=1000.0,
        run_id=run_id.hex(),
        run=manifest.name,
        peer_id=ids[0],
        name="ada",
        device="cpu",
        version="0.1.0",
        protocol=manifest.protocol,
        round=0,
        state_id=run_id.hex(),
        last_round=100,
    )
    yield beginning
    for event in rounds:
        yield event
        yield Worked(
            t=event.t,
            round=event.round,
            loss=9.0 - event.round / 30,
            bits_per_byte=3.0,
            tokens_per_second=12345.6,
            computing_seconds=1.5,
            exchange_seconds=0.25,
            disk_seconds=0.01,
            waiting_seconds=0.4,
            bytes_sent=31_000,
            bytes_received=30_000,
            consumed_share=0.9,
        )
    at = rounds[-1]
    figures = {"bits_per_byte": 2.345}
    yield Measured(t=at.t, round=at.round, state_id=at.state_id, by=ids[0], figures=figures, tokens=4096)
    others = [
        *ids[1:],
        "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp",
        "12D3KooWHHzSeKaY8xuZVzkLbKFfvNgPPeKhFBGrMbNzbm5akpqu",
    ]
    for number, (peer, name) in enumerate(zip(others, (LONG, HTML, "mary", "edith"), strict=False)):
        yield Heard(
            t=at.t,
            peer_id=peer,
            name=name,
            state=("training", "paused", "lost", "syncing")[number],
            round=at.round - number,
            state_id=rounds[-1 - number].state_id,
            tokens_per_second=12345.6 / (1 + number),
            loss=None if number else 6.1,
            device="cuda (NVIDIA GeForce RTX 4090)",
            version="0.1.0",
            path=("direct", "relayed", "client", "direct")[number],
        )


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path)
    log = EventLog(made.events)
    for event in past():
        log.write(event)
    kept(made.seals)
    made.manifest.write_bytes((RECORDED / "manifest.signed").read_bytes())
    return made


def test_every_page_fits_and_can_be_read_in_light_and_dark_on_a_desk_and_on_a_phone(home: Home, tmp_path: Path) -> None:
    program = browser_program()
    if program is None:
        pytest.skip(NO_BROWSER)
    pytest.importorskip("sse_starlette", reason="pip install 'p2ptrain[dashboard]'")
    from p2ptrain.dashboard.source import HomeSource

    with served(HomeSource(home)) as url:
        assert asyncio.run(take(f"{url}/", tmp_path / "pictures", program)) == []
    assert len(list((tmp_path / "pictures").iterdir())) == len(SCHEMES) * len(SIZES) * len(VIEWS)
