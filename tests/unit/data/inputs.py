"""Files as people have them, made on the spot."""

from __future__ import annotations

import random
from pathlib import Path

_RANDOM = random.Random(7)
_NOUNS = (
    "river",
    "mill",
    "bridge",
    "baker",
    "lantern",
    "garden",
    "ferry",
    "orchard",
    "clock",
    "harbour",
    "ladder",
    "meadow",
)
_VERBS = ("carries", "mends", "counts", "paints", "follows", "opens", "borrows", "measures", "greets", "keeps")


def sentence() -> str:
    """A sentence."""
    return f"The {_RANDOM.choice(_NOUNS)} {_RANDOM.choice(_VERBS)} the {_RANDOM.choice(_NOUNS)}."


def text(size: int) -> str:
    """About `size` characters of paragraphs."""
    out, length = [], 0
    while length < size:
        out.append(" ".join(sentence() for _ in range(_RANDOM.randint(2, 6))))
        length += len(out[-1]) + 2
    return "\n\n".join(out) + "\n"


def put(path: Path, content: bytes | str) -> Path:
    """Write a file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
