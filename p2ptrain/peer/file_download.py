"""A file of the run, fetched in pieces from whichever peers have it, by a peer that has nothing of the run yet.

How pieces come is `history/download.py`'s. Here is what comes around it: whom to ask, before there is a chain and news
of others; whether there is room on the disk; and trying again, for as long as something comes.

Cost: a look in the DHT every `LOOK_SECONDS`. What was fetched stays on disk when the process ends, and is not fetched
again. Given up: a newcomer hands out nothing before it has begun to take part.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError
from p2ptrain.errors import DataError, HomeError
from p2ptrain.history.download import Download
from p2ptrain.state import run_files
from p2ptrain.state.pieces import Partials, PieceFile
from p2ptrain.state.run_files import RunFile
from p2ptrain.state.snapshot import PIECE_BYTES
from p2ptrain.swarm.tasks import cancel_and_wait

ATTEMPTS = 3
"""In a row without a piece, after which nobody is counted on."""
RETRY_SECONDS = 1.0
"""A peer that has just started, or a DHT that has just lost one, may need a moment."""
LOOK_SECONDS = 10.0
"""Between two looks in the DHT for others who have it."""

_logger = logging.getLogger(__name__)


async def fetch_file(
    client: Client,
    file: RunFile,
    path: Path,
    introducers: Collection[bytes],
    records_key: bytes,
    progress: Callable[[str, int, int], None],
    what: str,
    wanted: Collection[int] | None = None,
) -> PieceFile:
    """Fetch a file of the run to `path`, from any peers of the run; those that `introducers` names are asked first.

    Args:
        records_key: of the manifest.
        progress: hears (what, bytes done, of); while what an earlier process left is looked at, on another thread.
        what: it is, for people.
        wanted: the pieces to fetch; None: all. The file of a part stays where unfinished ones are.

    Raises:
        DataError: nobody has it, or nobody goes on handing it out.
        HomeError: the disk has no room for it.
    """
    node, partials = client.node, Partials(path.parent)
    known = [peer for peer in introducers if peer != node.peer_id]

    async def look() -> None:
        # Anyone may publish records, of any number of peers; a person has given the addresses of the first.
        found = await node.read_peers(client.run_id, records_key)
        known[:] = [peer for peer in dict.fromkeys((*introducers, *found)) if peer != node.peer_id]

    async def keep_looking() -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await look()

    _check_room(partials.path_of_file(file.root), file.length if wanted is None else len(wanted) * PIECE_BYTES)
    looking = asyncio.create_task(keep_looking())
    attempts = 0
    try:
        while True:
            await look()
            download = Download(
                client,
                file,
                partials,
                lambda: known,
                lambda done, of: progress(what, done, of),
                looked=lambda done, of: progress(f"{what}, what is here already", done, of),
                reach=node.connect,
                wanted=wanted,
            )
            try:
                fetched = await download.run()
                break
            except CallError as error:
                _logger.info("%s: %s", what, error)
                attempts = 0 if download.came else attempts + 1
                if attempts >= ATTEMPTS:
                    raise DataError(
                        f"none of {len(known)} peers hands out the run's {what}: {error}",
                        hint="try again later: what has come is kept",
                    ) from error
            await asyncio.sleep(RETRY_SECONDS)
        return fetched if wanted is not None else await asyncio.to_thread(_take, fetched, path, partials)
    except OSError as error:
        raise HomeError(
            f"cannot write the run's {what} to {path.parent}: {error.strerror}", hint="make room, then start again"
        ) from error
    finally:
        await cancel_and_wait([looking])


def _check_room(partial: Path, length: int) -> None:
    """Say before anything is fetched that it would not fit. Raises HomeError."""
    there = partial.stat().st_blocks * 512 if partial.exists() else 0
    free = shutil.disk_usage(partial.parent).free
    if free + there < length:
        raise HomeError(
            f"a file of {length:,} bytes does not fit on the disk of {partial.parent}, which has {free:,} free",
            hint="make room, or choose another home with --home DIR",
        )


def _take(fetched: PieceFile, path: Path, partials: Partials) -> PieceFile:
    taken = run_files.take(fetched, path)
    partials.keep_only(None)
    return taken
