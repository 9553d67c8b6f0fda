"""A file's bytes, unpacked on the way, hashed and counted as they lie on disk.

What is packed is told by its first bytes, not by its name, so that pipes are unpacked too. Memory: a few buffers,
however long the file.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeAlias, cast

import zstandard

from p2ptrain.data.listing import STDIN, DataFile
from p2ptrain.errors import DataError

Reader: TypeAlias = "io.BufferedReader[Any]"
_BUFFER_BYTES = 1 << 18
_UNPACKERS: dict[bytes, Callable[[Reader], IO[bytes]]] = {
    b"\x1f\x8b": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    b"BZh": lambda raw: cast(IO[bytes], bz2.BZ2File(raw)),
    b"\xfd7zXZ\0": lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),  # noqa: SIM115
    b"\x28\xb5\x2f\xfd": lambda raw: io.BufferedReader(_Zstandard(raw), _BUFFER_BYTES),
}
_ARCHIVES = {
    b"PK\x03\x04": ("a zip archive", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x"),
    b"Rar!": ("a rar archive", "unrar x"),
    b"%PDF": ("a PDF", "pdftotext"),
}
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile)


class Counted(io.RawIOBase):
    """The bytes of a file as they lie on disk.

    Args:
        raw: unbuffered.
        progress: hears how many more bytes were read.
    """

    def __init__(self, raw: io.RawIOBase, progress: Callable[[int], None]) -> None:
        self._raw, self._progress = raw, progress
        self.bytes, self._sha256 = 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int | None:
        count = self._raw.readinto(buffer)  # type: ignore[arg-type]
        if count:
            self._sha256.update(memoryview(buffer)[:count])  # type: ignore[arg-type]
            self.bytes += count
            self._progress(count)
        return count

    @property
    def sha256(self) -> str:
        """Hash of what was read, in hex."""
        return self._sha256.hexdigest()

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Zstandard(io.RawIOBase):
    """Frames of zstandard one after another; unlike the library's own reader it says where the last one is cut off."""

    def __init__(self, raw: Reader) -> None:
        self._raw, self._out = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        while not self._out:
            packed = self._raw.read1(_BUFFER_BYTES) if not self._frame.eof else self._frame.unused_data
            if self._frame.eof:
                packed = packed or self._raw.read1(_BUFFER_BYTES)
                if not packed:
                    return 0
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            if not packed:
                if self._begun:
                    raise EOFError("the last frame is cut off")
                return 0
            self._begun = True
            self._out = self._frame.decompress(packed)
        count = min(len(view), len(self._out))
        view[:count], self._out = self._out[:count], self._out[count:]
        return count


@contextlib.contextmanager
def opened(file: DataFile, progress: Callable[[int], None]) -> Iterator[tuple[Reader, Counted]]:
    """The unpacked bytes of a file, and what counts and hashes the packed ones.

    Raises:
        DataError: it cannot be read or unpacked, or is an archive; also later, while its bytes are read.
    """
    with errors_named(file):
        handle = sys.stdin.fileno() if file.path == STDIN else file.path
        counted = Counted(io.FileIO(handle, closefd=file.path != STDIN), progress)
        with counted, io.BufferedReader(counted, _BUFFER_BYTES) as raw:
            begin = raw.peek(8)
            for magic, (what, tool) in _ARCHIVES.items():
                if begin.startswith(magic):
                    raise DataError(
                        f"{file.name} is {what}, not text", hint=f"{tool} {file.name}   and give what comes out of it"
                    )
            unpack = next((unpack for magic, unpack in _UNPACKERS.items() if begin.startswith(magic)), None)
            if unpack is None:
                yield raw, counted
                return
            with unpack(raw) as unpacked, io.BufferedReader(cast(io.RawIOBase, unpacked), _BUFFER_BYTES) as reader:
                yield reader, counted


@contextlib.contextmanager
def errors_named(file: DataFile) -> Iterator[None]:
    """Turn what reading raises into errors that name the file.

    Raises:
        DataError: in place of errors of the system and of unpacking.
    """
    try:
        yield
    except _BROKEN as error:
        raise DataError(
            f"{file.name} cannot be unpacked: {error}",
            hint="it is damaged or was cut off: get it again, or leave it out",
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read {file.name}: {error.strerror or error}", hint="leave it out, or allow reading"
        ) from error
