"""One libp2p daemon (p2pd) as a child process: starting it, noticing that it died, leaving nothing of it behind.

It is reached through sockets in a directory of mode 0700, since whoever can open them speaks as this peer. The daemon
ends by itself seconds after its parent; the directory is removed by a small shell that waits for the parent's end of a
pipe to close, which happens even after SIGKILL. Cost: two child processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from p2ptrain.errors import DaemonError, UnreachableError
from p2ptrain.swarm import circuits
from p2ptrain.swarm.addresses import listening_address
from p2ptrain.swarm.circuits import RelayCaps
from p2ptrain.swarm.guards import MAX_UNARY_BYTES
from p2ptrain.swarm.line import Line
from p2ptrain.swarm.streams import BoundedP2P

START_SECONDS = 45.0
"""On a machine where others take all cores, and this peer gives way to them, it takes so long."""
STOP_SECONDS = 5.0
RELAY_STARTS_MAX = 20
"""Of a daemon that is to relay: which caps it has is a matter of chance, see `circuits.holds`."""

_logger = logging.getLogger(__name__)

# A socket's path may have 107 characters, and the longest name in the directory has 27.
_MAX_DIRECTORY_CHARACTERS = 79


class SocketDirectory:
    """A private directory that goes away with this process, however the process ends."""

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        if len(base) + len("/p2ptrain-12345678") > _MAX_DIRECTORY_CHARACTERS:
            base = "/tmp"
        self.path = Path(tempfile.mkdtemp(prefix="p2ptrain-", dir=base))
        self._remover = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; rm -rf -- "$1"', "p2ptrain-sockets", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def remove(self) -> None:
        """Removes the directory now. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._remover.communicate()


@dataclass(frozen=True)
class DaemonSettings:
    """What the daemon is started, and restarted, with."""

    identity_path: Path
    sockets: Path
    """The directory for its sockets."""
    host: str
    """IP address to listen on."""
    port: int
    """TCP port to listen on, never 0: a restart must come back to the same one."""
    announce: Sequence[str]
    """Multiaddrs told to others in place of those found; empty: those found."""
    listen: bool
    """False: dials out only."""
    nat: bool
    """Whether to open ports by UPnP, find out about reachability, and use relays."""
    relays: Sequence[str]
    """Full multiaddrs of peers that may relay to this one when it cannot be dialled."""
    relaying: RelayCaps | None = None
    """What this peer carries for others; None: what libp2p chooses, once it finds this peer to be reachable."""
    line: Line | None = None
    """Holds streams' frames back by the owner's limits."""


class Daemon:
    """A running p2pd and the connection to it; made by `start`."""

    def __init__(self, p2p: P2P) -> None:
        self.p2p = p2p

    @classmethod
    async def start(cls, settings: DaemonSettings) -> Daemon:
        """Raises DaemonError when the daemon does not come up."""
        if settings.relaying is None or not settings.relaying.reservations:
            return await cls._start(settings)
        for _ in range(RELAY_STARTS_MAX):
            daemon = await cls._start(settings)
            try:
                if await circuits.holds(settings.relaying, daemon.p2p, f"/unix{settings.sockets}/"):
                    return daemon
            except (UnreachableError, P2PDaemonError, OSError, ValueError, EOFError) as error:
                _logger.debug("the daemon's relay was not tried: %s", error)
            except BaseException:
                await daemon.stop()
                raise
            await daemon.stop()
        raise DaemonError(
            f"the libp2p daemon does not relay as it was told to, after {RELAY_STARTS_MAX} starts",
            hint="run again; with -v it says more",
        )

    @classmethod
    async def _start(cls, settings: DaemonSettings) -> Daemon:

        class PrivateP2P(BoundedP2P):
            _UNIX_SOCKET_PREFIX = f"/unix{settings.sockets}/"
            line = settings.line

            @staticmethod
            def _make_process_args(*arguments: Any, **flags: Any) -> list[str]:
                caps = {} if settings.relaying is None else settings.relaying.flags()
                return list(P2P._make_process_args(*arguments, **flags, **caps))

        # Without relays of its own the daemon would turn to those of the public IPFS network.
        relays = list(settings.relays) if settings.nat and settings.listen else []
        creation = asyncio.ensure_future(
            PrivateP2P.create(
                identity_path=str(settings.identity_path),
                # The check starts another daemon and dials the swarm; the lock on the home does the same for less.
                check_if_identity_free=False,
                host_maddrs=[listening_address(settings.host, settings.port)] if settings.listen else [],
                announce_maddrs=list(settings.announce) or None,
                no_listen=not settings.listen,
                dht_mode="server" if settings.listen else "client",
                nat_port_map=settings.nat and settings.listen,
                auto_nat=settings.nat,
                use_relay=settings.nat or settings.relaying is not None,
                # Who does not take itself for public relays nothing.
                force_reachability=None if settings.relaying is None else "public",
                use_auto_relay=bool(relays),
                trusted_relays=relays or None,
                persistent_conn_max_msg_size=MAX_UNARY_BYTES,
                startup_timeout=START_SECONDS,
            )
        )
        try:
            return cls(await asyncio.shield(creation))
        except asyncio.CancelledError:
            # Given up half way, it would leave its child behind: neither creating nor stopping it is cut short, even by
            # another cancellation.
            giving_up = asyncio.create_task(cls._stop_created(creation))
            while not giving_up.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({giving_up})
            raise
        except (P2PDaemonError, OSError, ValueError, EOFError) as error:
            raise DaemonError(
                f"the libp2p daemon does not start: {error}",
                hint="run again with -v; if the program itself is at fault: pip install --force-reinstall hivemind",
            ) from error

    @classmethod
    async def _stop_created(cls, creation: asyncio.Future[P2P]) -> None:
        with contextlib.suppress(P2PDaemonError, OSError, ValueError, EOFError):
            await cls(await creation).stop()

    @property
    def pid(self) -> int:
        """Process id of p2pd."""
        return int(self.p2p._child.pid)

    async def died(self) -> None:
        """Returns when p2pd has ended, or when it no longer talks to us."""
        exited = asyncio.ensure_future(self.p2p._child.wait())
        try:
            await asyncio.wait({exited, self.p2p._client.control._read_task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            exited.cancel()

    async def stop(self) -> None:
        """Ends the daemon and fails the calls that still wait for it, which would otherwise wait for ever."""
        for call in list(self.p2p._client.control._pending_calls.values()):
            if not call.done():
                call.set_exception(P2PDaemonError("the libp2p daemon has ended"))
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.p2p.shutdown()
        except TimeoutError:
            self.p2p._child.kill()
            await self.p2p._child.wait()
        control = self.p2p._client.control
        # They end with the connection, often by an error that nobody else would collect.
        await asyncio.gather(control._read_task, control._write_task, return_exceptions=True)
        # Only a daemon that was asked to end removes its own socket.
        with contextlib.suppress(FileNotFoundError):
            Path(self.p2p.daemon_listen_maddr["unix"]).unlink()
