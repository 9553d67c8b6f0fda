"""What a home may hold on disk, as its owner allows it, and what goes first where it holds more.

A home grows by files that are replaced whole: a checkpoint and a snapshot are there twice for a while. So room for the
next ones is kept free. Where that is missing, what a peer can do without goes, one file after the other: snapshots but
the newest two, of which the newest may not be in a seal yet, with the rounds before them; seals and events but their
newest file; tokens and first values of other runs. Checkpoints that the owner wants kept stay. Where all of that is not
enough, no round is taken in (`check`) until there is room.

Cost: one walk over the home's names every `LOOK_SECONDS`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from p2ptrain.config.amounts import format_amount
from p2ptrain.config.home import Home
from p2ptrain.state.checkpoint import NAME
from p2ptrain.state.snapshot import SnapshotStore

LOOK_SECONDS = 10.0
SNAPSHOTS_KEPT = 2
_BLOCK_BYTES = 512
"""Of `st_blocks`, whatever the file system's blocks are (stat(2))."""


class HomeFullError(OSError):
    """The home holds all that its owner allows."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EDQUOT, text)


class Room:
    """See the module docstring. `look` is for any one thread; the rest for the thread that writes the journal.

    Args:
        most_bytes: that the home may hold.
        reserve_bytes: that the next checkpoint and the next snapshot take.
        needed: roots, in hexadecimal, of the files that this home's run needs.
    """

    def __init__(self, home: Home, most_bytes: int, reserve_bytes: int, needed: frozenset[str] = frozenset()) -> None:
        self._home, self._most_bytes, self._reserve_bytes, self._needed = home, most_bytes, reserve_bytes, needed
        #: on disk, at the last look; 0: nobody has looked yet
        self.held_bytes = 0
        #: files that went since the last time that somebody asked, for the log
        self.removed: list[str] = []

    @property
    def missing_bytes(self) -> int:
        """How much more is held than leaves room for what is written next."""
        return max(0, self.held_bytes + self._reserve_bytes - self._most_bytes)

    def check(self) -> None:
        """Raise HomeFullError where there is no room for another round."""
        if self.missing_bytes:
            raise HomeFullError(
                f"the home {self._home.path} holds {format_amount(self.held_bytes)}, next to "
                f"{format_amount(self._reserve_bytes)} for the next checkpoint and snapshot, and --max-disk allows "
                f"{format_amount(self._most_bytes)}"
            )

    def look(self) -> None:
        """Find out what the home holds."""
        self.held_bytes = held_bytes(self._home.path)

    def make(self, prune_journal: Callable[[int], None]) -> None:
        """Remove files until there is room, or nothing is left that may go.

        Args:
            prune_journal: forgets the rounds before one.
        """
        for path in self._spare():
            if not self.missing_bytes:
                break
            self.held_bytes -= _disk_bytes(path)
            path.unlink(missing_ok=True)
            self.removed.append(path.name)
            if path.parent == self._home.checkpoints:
                before = min([s.round for s in SnapshotStore(path.parent).all()] + [_checkpoint_round(path.parent)])
                prune_journal(before + 1)

    def _spare(self) -> Iterator[Path]:
        """Yield what may go, what is missed least first."""
        yield from (
            snapshot.path for snapshot in reversed(SnapshotStore(self._home.checkpoints).all()[SNAPSHOTS_KEPT:])
        )
        yield from sorted(self._home.seals.glob("seals-*"))[:-1]
        yield from sorted(self._home.events.glob("events-*.jsonl"))
        for kind in ("tokens", "values"):
            for path in sorted(self._home.data.glob(f"*.{kind}")):
                if path.stem not in self._needed and path != self._home.own_tokens:
                    yield path


def held_bytes(folder: Path) -> int:
    """Return what the files below a folder take on disk; of a file with holes, what is there."""
    return sum(_disk_bytes(Path(where, name)) for where, _, names in os.walk(folder) for name in names)


def _disk_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.lstat().st_blocks * _BLOCK_BYTES
    return 0  # it has gone meanwhile


def _checkpoint_round(folder: Path) -> int:
    """Return the round of the checkpoint, whose restart needs the rounds after it."""
    try:
        return int(json.loads((folder / NAME).read_bytes())["round"])
    except (OSError, ValueError, KeyError):
        return 0
