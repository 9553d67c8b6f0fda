"""A running peer hears its owner's commands: through a socket in its home, which nobody else can open.

One request a connection, as a line of JSON, and one answer, as another. Who can open the socket speaks as the owner:
it is of mode 0600, in a folder of mode 0700, and nothing of it is reachable from the network. Its path may be longer
than the 107 characters that a socket's address holds, so both ends name it by the open folder that it is in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from p2ptrain.errors import NotRunningError, P2PTrainError, UsageError

NAME_MAX_BYTES = 100
"""Of a socket: 103 on macOS, 107 on Linux."""
REQUEST_MAX_BYTES = 4096
ANSWER_MAX_BYTES = 2**22
"""More than all decisions that are kept, as text."""
READ_SECONDS = 5.0
"""For a request to be complete, once somebody has opened the socket."""

_logger = logging.getLogger(__name__)


class Ask(msgspec.Struct, frozen=True, tag="status", tag_field="command", forbid_unknown_fields=True):
    """How is it?"""

    why: bool = False
    """With the last decisions."""


class Pause(msgspec.Struct, frozen=True, tag="pause", tag_field="command", forbid_unknown_fields=True):
    """Hand over what is computed, say goodbye, and give the memory back."""

    seconds: float | None = None
    """After which it goes on by itself; None: when told to."""


class Resume(msgspec.Struct, frozen=True, tag="resume", tag_field="command", forbid_unknown_fields=True):
    """Take part again."""


class Finish(msgspec.Struct, frozen=True, tag="finish", tag_field="command", forbid_unknown_fields=True):
    """End the round under way, and leave."""


class Leave(msgspec.Struct, frozen=True, tag="leave", tag_field="command", forbid_unknown_fields=True):
    """Leave now."""


class Limit(msgspec.Struct, frozen=True, tag="limits", tag_field="command", forbid_unknown_fields=True):
    """What may this peer's line carry, or: let it carry this from now on."""

    key: str = ""
    """Of the limit to change, as its flag is called; empty: none."""
    value: str = ""
    """As its flag takes it; empty, or 0: no limit."""


Request = Ask | Pause | Resume | Finish | Leave | Limit
Answer = dict[str, Any]

_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Give a name that is short enough for a socket of a path in a folder, good while this lasts."""
    if len(os.fsencode(path)) <= NAME_MAX_BYTES:
        yield str(path)
        return
    # Not every system has names for open folders, as Linux has in /proc; all follow links.
    with tempfile.TemporaryDirectory(prefix="p2ptrain-", dir="/tmp") as folder:
        link = Path(folder) / "home"
        link.symlink_to(path.parent.resolve())
        yield str(link / path.name)


class Control:
    """Listens at `path`; for the network thread.

    Args:
        answer: does what is asked; what it raises of `P2PTrainError` goes to who asked.
    """

    def __init__(self, path: Path, answer: Callable[[Request], Awaitable[Answer]]) -> None:
        self._path, self._answer = path, answer
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to listen; whoever listened here before is gone, as its home is this process's.

        Raises:
            OSError: the home's file system has no sockets.
        """
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)
            with _short(self._path) as name:
                listening.bind(name)
            # In a folder that nobody else may enter, so that there is no moment in which others could connect.
            self._path.chmod(0o600)
            listening.setblocking(False)
            self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=REQUEST_MAX_BYTES)
        except BaseException:
            listening.close()
            raise

    async def close(self) -> None:
        """Listen no more. Those who wait for an answer see this process go."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answer_to(reader)
            with contextlib.suppress(OSError):
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except asyncio.CancelledError:
            # This process ends, which is the answer; asyncio would log it as a failure.
            pass
        finally:
            writer.close()

    async def _answer_to(self, reader: asyncio.StreamReader) -> Answer:
        try:
            async with asyncio.timeout(READ_SECONDS):
                line = await reader.readuntil(b"\n")
            return await self._answer(_requests.decode(line))
        except P2PTrainError as error:
            return {"error": str(error), "hint": error.hint, "exit_code": error.exit_code}
        except (msgspec.MsgspecError, TimeoutError, EOFError, asyncio.LimitOverrunError) as error:
            return {"error": f"not a request: {error}", "hint": "", "exit_code": UsageError.exit_code}
        except Exception as error:
            _logger.exception("a command of the owner's has failed")
            return {"error": f"the peer could not do it: {error!r}", "hint": "p2ptrain logs", "exit_code": 1}


def ask(path: Path, request: Request, timeout_seconds: float) -> Answer:
    """Ask the peer whose socket is at `path`, and return what it answers; {} where it has ended without a word.

    Raises:
        NotRunningError: no peer listens there, or it does not answer in time.
        P2PTrainError: what the peer says is wrong with the request, with its exit code.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        try:
            with _short(path) as name:
                connection.connect(name)
            connection.sendall(msgspec.json.encode(request) + b"\n")
            data = _read(connection)
        except TimeoutError as error:
            raise NotRunningError(
                f"the peer of home {path.parent} does not answer within {timeout_seconds:.0f} s",
                hint="is its process stopped? p2ptrain logs",
            ) from error
        except PermissionError as error:
            raise NotRunningError(
                f"the peer of home {path.parent} is another user's", hint="ask as the user who started it"
            ) from error
        except OSError as error:
            raise not_running(path.parent) from error
    if not data:
        return {}
    answer: Answer = json.loads(data)
    if "error" in answer:
        said = P2PTrainError(answer["error"], hint=answer["hint"])
        said.exit_code = answer["exit_code"]  # type: ignore[misc]  # of this one alone
        raise said
    return answer


def not_running(home: Path) -> NotRunningError:
    """Make the error for a home whose peer does not run."""
    return NotRunningError(
        f"no peer runs in home {home}", hint="start it: p2ptrain join; or name its home with --home DIR"
    )


def _read(connection: socket.socket) -> bytes:
    data = bytearray()
    while len(data) < ANSWER_MAX_BYTES:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        data += piece
    return bytes(data)
