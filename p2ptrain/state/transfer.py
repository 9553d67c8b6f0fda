"""What a peer has sent and received this month, kept in its home, so that a restart does not count anew.

Months are UTC's. Written whole, at most every `WRITE_SECONDS`, and at the end: a peer that is killed forgets no more
than that. The file holds one month; the last one is forgotten when the next begins.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from p2ptrain.errors import HomeError
from p2ptrain.state.files import atomic_write

WRITE_SECONDS = 10.0
_FILE_MAX_BYTES = 4096


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    month: Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}\Z")]
    sent_bytes: Annotated[int, Meta(ge=0)]
    received_bytes: Annotated[int, Meta(ge=0)]
    #: seconds since 1970
    written_at: float


class MonthlyTransfer:
    """See the module docstring. Times are seconds since 1970.

    Raises:
        HomeError: there is a file that cannot be read; counting anew could cost its owner money.
    """

    def __init__(self, path: Path, now: float) -> None:
        self._path = path
        kept = _read(path)
        self.month = _month(now)
        self.sent_bytes = self.received_bytes = 0
        #: when it was written last, by an earlier process too
        self.written_at = 0.0
        if kept is not None and kept.month >= self.month:  # the same but for a clock that was set back
            self.sent_bytes, self.received_bytes = kept.sent_bytes, kept.received_bytes
            self.written_at = kept.written_at

    def used_bytes(self, now: float) -> int:
        """Return what the month that it is now has carried, both ways."""
        return self.sent_bytes + self.received_bytes if _month(now) <= self.month else 0

    def count(self, sent_bytes: int, received_bytes: int, now: float) -> None:
        """Add what was carried since the last call, and write it down from time to time. Raises OSError."""
        if _month(now) > self.month:
            self.month, self.sent_bytes, self.received_bytes = _month(now), 0, 0
        self.sent_bytes += sent_bytes
        self.received_bytes += received_bytes
        if not 0 <= now - self.written_at < WRITE_SECONDS:
            self.write(now)

    def write(self, now: float) -> None:
        """Write it down now. Raises OSError."""
        self.written_at = now
        atomic_write(
            self._path, msgspec.json.encode(_Kept(self.month, self.sent_bytes, self.received_bytes, now)) + b"\n"
        )


def month_ends_at(now: float) -> float:
    """Return when the next month begins [seconds since 1970]."""
    today = datetime.datetime.fromtimestamp(now, datetime.UTC)
    first = today.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + datetime.timedelta(days=32)).replace(day=1).timestamp()


def _month(now: float) -> str:
    return datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m")


def _read(path: Path) -> _Kept | None:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_FILE_MAX_BYTES), type=_Kept)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise HomeError(
            f"cannot read what this month has carried so far, {path}: {error}",
            hint=f"rm {path} to count this month from zero",
        ) from error
