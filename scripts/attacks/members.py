"""Attacks by members that train as all do and lie about one thing: real peers with one part replaced (`lying_peer`)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from attacks.forged import key_from
from attacks.hostile import Attack

LYING_PEER = Path(__file__).with_name("lying_peer.py")
MEMBER_SECONDS = 120.0
LOOK_SECONDS = 1.0
END_SECONDS = 30.0


class LyingMember(Attack):
    """Join as a real peer, behave, lie while the attack lasts, and behave again. `lie`: see `lying_peer.LIES`."""

    stays = True

    async def prepare(self) -> list[bytes]:
        """Start the peer and wait until a seal has included it."""
        hostile = self.hostile
        home, self._switch = hostile.folder / "member", hostile.folder / "lies"
        home.mkdir()
        identity = key_from(hostile.chance, home / "identity.key")
        flags = ["--home", str(home), "--name", "mallory", "--host", "127.0.0.1", "--threads", "1"]
        lying = [sys.executable, str(LYING_PEER), str(self.options["lie"]), str(self._switch)]
        with (hostile.folder / "member.log").open("w") as log:
            self._process = subprocess.Popen(
                [*lying, "join", *hostile.addresses[:1], *flags, "--log-format", "json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        async with asyncio.timeout(MEMBER_SECONDS):
            included = False
            while not included:
                await asyncio.sleep(LOOK_SECONDS)
                members = (await hostile.fetch()).state.now
                included = any(member.peer_id == identity.peer_id and member.included for member in members)
        return [hostile.node.peer_id, identity.peer_id]

    async def run(self) -> None:
        """Lie."""
        self._switch.touch()
        try:
            await asyncio.Event().wait()
        finally:
            self._switch.unlink()

    async def close(self) -> None:
        """Have the peer leave."""
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
