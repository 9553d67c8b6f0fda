"""Whether a port of somebody else's can be reached from here, by a connection of its own.

libp2p's connections say nothing of it: one that the other end has opened serves both. So a plain TCP connection is
opened, and the greeting that every libp2p peer sends first is read. Nothing is sent. Cost: a handshake.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable

DIAL_SECONDS = 4.0
GREETING = b"\x13/multistream/1.0.0\n"


def host_and_port(route: str) -> tuple[str, int]:
    """Return host and TCP port of a multiaddr such as /ip4/203.0.113.7/tcp/4001; ("", 0) where it has none."""
    parts = route.split("/")
    if len(parts) < 5 or parts[3] != "tcp" or not parts[4].isdigit() or "p2p-circuit" in parts:
        return "", 0
    return parts[2], int(parts[4])


def ip_of(routes: Iterable[str]) -> str:
    """Return the IP address that one of these connections comes from; "" where all come through a relay."""
    for route in routes:
        host, _ = host_and_port(route)
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            continue
    return ""


async def dial_back(host: str, port: int) -> str:
    """Return why no libp2p peer can be reached at this IP address and port, or "" where one greets."""
    writer = None
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            greeting = await reader.readexactly(len(GREETING))
    except TimeoutError:
        return "no answer, as where a firewall or a router drops what comes in" if writer is None else "no libp2p there"
    except ConnectionRefusedError:
        return "refused, as where nothing listens or the router sends it elsewhere"
    except asyncio.IncompleteReadError:
        return "no libp2p there"
    except OSError as error:
        return error.strerror or "no connection"
    finally:
        if writer is not None:
            writer.close()
    return "" if greeting == GREETING else "no libp2p there"
