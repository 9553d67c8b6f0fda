"""Files that are either the old content or the new, whatever happens in between.

A rename on one file system is atomic for every process that looks. Against a power cut it needs two `fsync`s, of the
content and of the directory: `durable` asks for them; what can be made again goes without.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from p2ptrain.state.failpoints import failpoint

UNFINISHED_PREFIX = ".tmp-"


def atomic_write(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Replace `path` by `data` in one step; with `durable` it also survives a power cut.

    Raises:
        OSError: the file system does not take it; `path` is then as it was.
    """
    with atomic_writer(path, mode=mode, durable=durable) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_writer(path: Path, *, mode: int = 0o600, durable: bool = False) -> Iterator[BinaryIO]:
    """Write what is too long for memory: `path` is replaced in one step at the end, as by `atomic_write`.

    Raises:
        OSError: the file system does not take it; `path` is then as it was, as after any error inside.
    """
    failpoint("before_write")
    with unfinished(path.parent, mode=mode, durable=durable) as file:
        yield file
        file.place(path)
    failpoint("after_write")


class Unfinished(io.BufferedWriter):
    """A file that has no name yet that anybody looks for; see `unfinished`."""

    def __init__(self, raw: io.RawIOBase, path: Path, durable: bool) -> None:
        super().__init__(raw)
        self._at, self._durable = path, durable

    def place(self, path: Path) -> None:
        """Take the place of `path`, in the same folder, in one step: all is written. Raises OSError."""
        self.flush()
        if self._durable:
            os.fsync(self.fileno())
        os.replace(self._at, path)
        if self._durable:
            sync_folder(path.parent)


@contextlib.contextmanager
def unfinished(folder: Path, *, mode: int = 0o600, durable: bool = False) -> Iterator[Unfinished]:
    """Write what is named by what is in it: `place` says where it is to be; what has no place by then is removed.

    Raises:
        OSError: the file system does not take it.
    """
    handle, name = tempfile.mkstemp(dir=folder, prefix=UNFINISHED_PREFIX)
    try:
        with Unfinished(io.FileIO(handle, "wb"), Path(name), durable) as file:
            os.fchmod(handle, mode)
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def is_full(error: OSError) -> bool:
    """Say whether a file was not written for want of room, which may come back."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_folder(folder: Path) -> None:
    """Have what was renamed in a folder survive a power cut. Raises OSError."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_unfinished(directory: Path) -> None:
    """Delete what processes killed inside `atomic_write` left in `directory`; nobody else may be writing there."""
    for path in directory.glob(f"{UNFINISHED_PREFIX}*"):
        path.unlink(missing_ok=True)
