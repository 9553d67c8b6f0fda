"""Whoever looks at a swarm loads nothing that trains: the first look is there in about a second."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

from test_doctor import SMALL, Peer
from test_node import peer_record

from p2ptrain.calls.messages import NAMESPACE, Traffic
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import open_manifest, sign_manifest
from p2ptrain.errors import NotRunningError
from p2ptrain.observe.events import EventLog, Started
from p2ptrain.swarm.identity import format_peer_id, new_identity

if TYPE_CHECKING:
    from conftest import Swarm

HEAVY = ("torch", "numba", "scipy", "transformers", "hivemind.averaging", "hivemind.moe", "hivemind.optim")
RUN = f"""
import sys, p2ptrain.cli.main
try:
    p2ptrain.cli.main.run(sys.argv[1:])
finally:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    print("loaded", loaded, file=sys.stderr)
"""


def looks(*arguments: str, until: str = "", code: int = 0) -> str:
    """Run a command to its end, or until it has printed `until`; return what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert process.stdout is not None
    printed = ""
    if until:
        while until not in printed:
            line = process.stdout.readline()
            assert line, f"{arguments} printed {printed!r}"
            printed += line
        process.send_signal(signal.SIGINT)
        code = 130
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code, (arguments, out, errors)
    assert errors.splitlines()[-1] == "loaded []", arguments
    return printed + out


def test_looking_loads_nothing_that_trains(swarm: Swarm, tmp_path: Path) -> None:
    owner = new_identity()
    signed = sign_manifest(SMALL, owner.key, format_peer_id(owner.peer_id))
    run_id = open_manifest(signed)[1]
    nobody = str(tmp_path / "nobody")

    async def scenario() -> None:
        ada = Peer(await swarm.node(), signed)
        await ada.node.add_servicer(PeerServicer(ada, Traffic()), NAMESPACE)  # type: ignore[arg-type]
        await ada.node.publish_peer(peer_record(ada.node.identity, run_id=run_id))
        (address, *_) = await ada.node.join_addresses()

        async def look(*arguments: str, until: str = "", code: int = 0) -> str:
            return await asyncio.to_thread(looks, *arguments, "--home", nobody, until=until, code=code)

        seen = json.loads(await look("inspect", address, "--format", "json"))
        assert [peer["peer_id"] for peer in seen["peers"]] == [format_peer_id(ada.node.peer_id)]
        assert "run test" in await look("inspect", address)
        assert "12D3" in await look("inspect", address, "dht")
        await look("top", address, until="round ")
        await look("dashboard", address, "--listen", "127.0.0.1:0", until="Dashboard of test")

    swarm.run(scenario())


def test_what_asks_a_home_loads_nothing_that_trains(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    events = EventLog(home.events)
    me = format_peer_id(new_identity().peer_id)
    events.write(
        Started(
            t=time.time(),
            run_id="00" * 32,
            run="test",
            peer_id=me,
            name="ada",
            device="cpu",
            version="0.1.0",
            protocol=1,
            round=0,
            state_id="00" * 32,
            last_round=0,
        )
    )
    here = str(home.path)
    assert "run test" in looks("replay", here)
    looks("status", "--home", here, code=NotRunningError.exit_code)
    looks("pause", "--home", here, code=NotRunningError.exit_code)
