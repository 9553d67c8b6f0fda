"""Which files a path means: what is read, in which order, and what is left out and why.

A file that a person names is read whatever it is called. In a folder only files of known kinds are, in name order, so
that the same folder gives the same text on every machine; hidden files and folders are left out, since what lies in
them (`.git`, `.venv`) is seldom meant.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from p2ptrain.errors import DataError

Kind = Literal["text", "jsonl", "parquet", "arrow"]

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KNOWN = "files of .txt, .md, .jsonl, .parquet and .arrow, the first three also as .gz, .bz2, .xz or .zst"
STDIN = Path("-")
_NAMED_MAX = 5


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to read."""

    path: Path
    name: str
    """For people: its path as given, or below the folder given."""
    source: int
    """Which of the paths given it belongs to, from 0."""
    kind: Kind | None
    """None: its content says."""
    bytes: int
    """Its length; 0 where it is a pipe."""

    @property
    def is_pipe(self) -> bool:
        """Whether it can be read only once."""
        return self.path == STDIN or not self.path.is_file()


@dataclass(frozen=True, slots=True)
class Listing:
    """What a list of paths means."""

    files: tuple[DataFile, ...]
    left_out: tuple[tuple[str, str], ...]
    """(name, why) of what lies there and is not read."""

    def __str__(self) -> str:
        """Return one line: how many are read, how many are left out and why."""
        read = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'} to read"
        if not self.left_out:
            return read
        reasons = Counter(why for _, why in self.left_out).most_common()
        names = [name for name, _ in self.left_out[:_NAMED_MAX]]
        more = ", ..." if len(self.left_out) > len(names) else ""
        why = ", ".join(f"{reason} {count}" for reason, count in reasons)
        return f"{read}; {len(self.left_out)} left out ({why}): {', '.join(names)}{more}"


def list_files(paths: Sequence[Path]) -> Listing:
    """The files that `paths` mean: themselves, what lies in folders, standard input where a path is `-`.

    Raises:
        DataError: a path leads nowhere, may not be read, or holds nothing that is read.
    """
    files: list[DataFile] = []
    left_out: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    for source, path in enumerate(paths):
        before = len(files)
        for file in _below(path, source, left_out) if path.is_dir() else [_named(path, source)]:
            same = _identity(file.path)
            if same is not None and same in seen:
                left_out.append((file.name, "there twice"))
                continue
            if same is not None:
                seen.add(same)
            files.append(file)
        if len(files) == before:
            why = f" ({Listing((), tuple(left_out))})" if left_out else ""
            raise DataError(f"nothing to read in {path}{why}", hint=f"give {KNOWN}, or a folder of them")
    return Listing(tuple(files), tuple(left_out))


def kind_of(name: str) -> Kind | None:
    """The kind that a file's name says, its compression aside; None: it says none."""
    stem = name.lower()
    for suffix in COMPRESSED:
        stem = stem.removesuffix(suffix)
    kind = KINDS.get(os.path.splitext(stem)[1])
    # What has to be read from both ends cannot be unpacked on the way.
    return None if kind in ("parquet", "arrow") and stem != name.lower() else kind


def _named(path: Path, source: int) -> DataFile:
    if path == STDIN:
        return DataFile(path, "standard input", source, None, 0)
    try:
        found = path.stat()
    except FileNotFoundError as error:
        broken = " is a broken link" if path.is_symlink() else ": there is no such file or folder"
        raise DataError(f"no text at {path}{broken}", hint=f"give {KNOWN}, or a folder of them") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="leave it out, or allow reading") from error
    if stat.S_ISREG(found.st_mode):
        return DataFile(path, str(path), source, kind_of(path.name), found.st_size)
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode):
        return DataFile(path, str(path), source, None, 0)
    raise DataError(f"{path} is neither a file, a folder nor a pipe", hint=f"give {KNOWN}, or a folder of them")


def _below(folder: Path, source: int, left_out: list[tuple[str, str]]) -> Iterator[DataFile]:
    """The files of a folder in name order, paths compared part by part."""
    found: list[tuple[tuple[str, ...], DataFile]] = []

    def unreadable(error: OSError) -> None:
        left_out.append((_relative(Path(error.filename), folder), f"no access: {error.strerror}"))

    for at, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(at)
        is_split = (here / "dataset_dict.json").is_file() and "train" in folders
        for name in sorted(folders):
            if name.startswith("."):
                left_out.append((_relative(here / name, folder) + "/", "hidden"))
            elif (here / name).is_symlink():
                left_out.append((_relative(here / name, folder) + "/", "link to a folder"))
            elif is_split and name != "train":
                left_out.append((_relative(here / name, folder) + "/", "another split than train"))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not (here / name).is_symlink() and (not is_split or name == "train")
        ]
        saved = (here / "dataset_info.json").is_file()
        for name in sorted(names):
            path = here / name
            relative = path.relative_to(folder)
            why = _left_out(path, saved)
            if why:
                left_out.append((relative.as_posix(), why))
            elif why is None:
                file = DataFile(path, relative.as_posix(), source, kind_of(name), path.stat().st_size)
                found.append((relative.parts, file))
    for _, file in sorted(found, key=lambda entry: entry[0]):
        yield file


def _left_out(path: Path, saved: bool) -> str | None:
    """Why a file of a folder is not read; None: it is; "": not worth a word.

    Args:
        saved: the folder is one that `datasets` has saved.
    """
    name = path.name
    if name.startswith("."):
        return "hidden"
    if (saved and name in ("dataset_info.json", "state.json")) or name == "dataset_dict.json":
        return ""
    if saved and name.startswith("cache-"):
        return "cache of datasets"
    if kind_of(name) is None:
        return os.path.splitext(name)[1].lower() or "no suffix"
    if not path.exists():
        return "broken link"
    if not path.is_file():
        return "no file"
    if not os.access(path, os.R_OK):
        return "no access"
    return "empty" if path.stat().st_size == 0 else None


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _identity(path: Path) -> tuple[int, int] | None:
    if path == STDIN:
        return (-1, -1)
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
