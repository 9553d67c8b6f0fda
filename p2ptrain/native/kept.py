"""Machine code kept on disk from one process to the next.

Into a loop's machine code goes that of all loops that it calls, and every constant that they read. So what is kept lies
in a folder named by a hash of all that loops may be made of: the sources of `native/`, `compression/` and `optim/`,
which import nothing of the package but each other, and the versions of what compiles them. Another source is another
folder, and the `FOLDERS` used last stay. A loop defined elsewhere is not kept.

A loop, compiled for arguments of some types on one kind of processor, is one file: a hash of the rest, then what it was
made for and the machine code. A file that is cut off, empty or otherwise changed is never run: a warning names it, and
the loop is compiled anew. Files are replaced whole, so processes that start at the same time, of one version or of
several, do not disturb each other.

Cost: one pass over these sources at start for the hash, and another for each loop that is loaded or compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
import platformdirs
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = ("compression", "native", "optim")
"""Where loops are defined, with all that they may call or read."""
FOLDERS = 4
"""How many versions' loops are kept."""
_HASH = hashlib.sha256
_HASH_BYTES = _HASH().digest_size

_logger = logging.getLogger(__name__)


def keep(loop: Any) -> None:
    """Have `loop`, a function that numba compiles, load what is kept of it and keep what it compiles."""
    if hasattr(loop, "py_func") and _is_source(loop.py_func):  # plain functions where numba is told not to compile
        loop._cache = Kept(loop.py_func, repr(sorted(loop.targetoptions.items())))


def _is_source(function: Callable[..., Any]) -> bool:
    path = Path(function.__code__.co_filename).resolve()
    return path.is_file() and any(path.is_relative_to(PACKAGE / name) for name in SOURCES)


def sources_hash() -> str:
    """Of all that machine code may be made of, as it lies on disk."""
    versions = (sys.version, numba.__version__, llvmlite.__version__, np.__version__)
    found = _HASH(repr(versions).encode())
    for path in sorted(path for name in SOURCES for path in (PACKAGE / name).rglob("*.py")):
        found.update(f"\n{path.relative_to(PACKAGE).as_posix()} ".encode())
        with contextlib.suppress(FileNotFoundError):  # an editor may be replacing it
            found.update(_HASH(path.read_bytes()).digest())
    return found.hexdigest()


_AT_START = sources_hash()


@functools.cache
def folder() -> Path | None:
    """Where this version's loops are kept; None where there is nowhere to write.

    That is within what NUMBA_CACHE_DIR names, beside the source, or in the user's cache, whichever is the first that
    can be written.
    """
    asked = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    places = [Path(asked) / "p2ptrain"] if asked else []
    places += [PACKAGE / "__pycache__", Path(platformdirs.user_cache_dir("p2ptrain", appauthor=False))]
    for place in places:
        found = place / "loops" / _AT_START[:32]
        try:
            for made in (place, found.parent, found):
                made.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not all(map(_ours_alone, (found.parent, found))):
                _logger.debug("compiled code is not kept in %s, where others can write", found)
                continue
            tempfile.TemporaryFile(dir=found).close()
            os.utime(found)
        except OSError:
            continue
        _remove_others(found)
        return found
    return None


def _ours_alone(path: Path) -> bool:
    """Whether nobody else can put a file there: what is loaded from it is run."""
    found = path.lstat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _remove_others(ours: Path) -> None:
    """Of folders beside `ours` those that were used longest ago, but for FOLDERS - 1."""
    others: list[tuple[float, Path]] = []
    for other in ours.parent.iterdir():
        with contextlib.suppress(OSError):  # another process removes them too
            if other != ours:
                others.append((other.stat().st_mtime, other))
    for _, other in sorted(others, reverse=True)[FOLDERS - 1 :]:
        shutil.rmtree(other, ignore_errors=True)


class Kept(NullCache):
    """What is kept of one function, as numba asks for it."""

    def __init__(self, function: Callable[..., Any], options: str) -> None:
        """Of `function`, compiled with these `options`."""
        code = function.__code__
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self._function = (function.__module__, function.__qualname__, code.co_firstlineno, options)
        self._closed = function.__closure__ is not None
        self._warned: set[Path] = set()

    @property
    def cache_path(self) -> str | None:
        found = folder()
        return str(found) if found else None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled for these types of arguments; None where it has to be compiled."""
        target_context.refresh()
        key = self._key(sig, target_context.codegen())
        path = self._path(key)
        if path is None or sources_hash() != _AT_START:  # a module that was loaded since may be another
            return None
        try:
            kept = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(path, f"cannot be read ({error.strerror})")
            return None
        held = memoryview(kept)
        if _HASH(held[_HASH_BYTES:]).digest() != held[:_HASH_BYTES]:
            self._warn(path, "is broken")
            return None
        made_for, reduced = pickle.loads(held[_HASH_BYTES:])
        return CompileResult._rebuild(target_context, *reduced) if made_for == key else None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, if it may be run by another process, and if its sources are still those on disk."""
        path = self._path(key := self._key(sig, data.codegen))
        if path is None or data.lifted or data.library.has_dynamic_globals or sources_hash() != _AT_START:
            return
        body = dumps((key, data._reduce()))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _replaced(path) as file:
                file.write(_HASH(body).digest() + body)
        except OSError as error:
            self._warn(path, f"cannot be written ({error.strerror})")

    def _key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        return (self._function, signature, codegen.magic_tuple())

    def _path(self, key: tuple[Any, ...]) -> Path | None:
        found = folder()
        if found is None or self._closed:  # what a function closes over is no source
            return None
        return found / f"{self._name}-{_HASH(repr(key).encode()).hexdigest()[:32]}.loop"

    def _warn(self, path: Path, fault: str) -> None:
        """Once a file."""
        if path not in self._warned:
            self._warned.add(path)
            _logger.warning("compiled code in %s %s: compiling it anew", path, fault)


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Any]:
    """A file that takes the place of `path` when it is written whole."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
