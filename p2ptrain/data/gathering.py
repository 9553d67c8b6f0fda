"""All documents of a list of files, one after another, with what was read and what was left out.

Two of a hundred short documents are drawn, by a hash of their text, to be held out: so it comes from everywhere in a
text of many documents, and copies of a document are on one side. A longer document is not drawn.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from p2ptrain.data.listing import Listing
from p2ptrain.data.reading import Passage, Tally, Wanted, read_file

DRAWN_BELOW = 2**64 // 50
SHORT_CHARACTERS = 1 << 16
"""A longer document is not drawn."""


@dataclass(slots=True)
class Gathered:
    """What was read, source by source."""

    tallies: list[tuple[int, str, Tally]] = field(default_factory=list)
    """(source, name, tally) of each file, in the order of reading."""

    @property
    def documents(self) -> int:
        """How many documents there were."""
        return sum(tally.documents for _, _, tally in self.tallies)

    def left_out(self) -> Counter[str]:
        """Documents that were left out, by reason."""
        return sum((tally.left_out for _, _, tally in self.tallies), Counter[str]())

    def lines(self) -> Iterator[str]:
        """What was read, for people, in a line or three."""
        files = len(self.tallies)
        yield f"read {self.documents:,} document{_s(self.documents)} of {files:,} file{_s(files)}"
        if left_out := self.left_out():
            why = ", ".join(f"{reason} {count:,}" for reason, count in left_out.most_common())
            yield f"left out {left_out.total():,} document{_s(left_out.total())} ({why})"
        if mended := sum(tally.mended for _, _, tally in self.tallies):
            yield f"in {mended:,} document{_s(mended)} half characters were replaced by the replacement mark"


def gather(
    listing: Listing, wanted: Wanted, gathered: Gathered, progress: Callable[[int], None] = lambda count: None
) -> Iterator[Passage]:
    """The passages of all files of a listing.

    Args:
        gathered: is filled in; complete once all was read.
        progress: hears how many more bytes were read.

    Raises:
        DataError: a file cannot be read; see `read_file`.
    """
    for file in listing.files:
        tally = Tally()
        gathered.tallies.append((file.source, file.name, tally))
        yield from read_file(file, wanted, tally, progress)


def documents(passages: Iterable[Passage]) -> Iterator[tuple[list[Passage], int | None]]:
    """(passages, draw) of documents; long ones in parts. Draw: a number below `DRAWN_BELOW`, if it is drawn."""
    held: list[Passage] = []
    characters, long = 0, False
    for passage in passages:
        held.append(passage)
        characters += len(passage.text)
        long = long or characters > SHORT_CHARACTERS
        if passage.ends or long:
            yield held, None if long else _draw(held)
            held, characters, long = [], 0, long and not passage.ends


def _draw(document: list[Passage]) -> int | None:
    text = "".join(passage.text for passage in document).strip()
    digest = hashlib.sha256(b"p2ptrain held out 1\0" + text.encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    return number if number < DRAWN_BELOW else None


def _s(count: int) -> str:
    return "" if count == 1 else "s"
