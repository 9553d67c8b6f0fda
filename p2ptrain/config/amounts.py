"""Amounts of bytes and rates as people write them: `200GB`, `1Mbit`, `500kbit`, `2MB` (bytes a second).

Units are decimal, as those of lines and of contracts with providers are; `MiB` and the like are powers of 1024. A rate
may end in `/s`, which changes nothing.
"""

from __future__ import annotations

import re

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]i?)?(bits?|b)(/s)?", re.IGNORECASE)

RATE_MIN_BYTES = 8_000
"""A second. Below it, keeping up with the DHT and the chain alone takes the whole line."""


def parse_rate(text: str) -> float:
    """Return bytes a second of a rate such as `1Mbit` or `2MB`; 0, or an empty text, is no limit.

    Raises:
        ValueError: it is none, or too low to take part; says what is expected.
    """
    if text in ("", "0"):
        return 0.0
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError("expected a rate such as 1Mbit, 500kbit or 2MB (bytes a second), or 0 for no limit")
    rate = _bytes_of(found)
    if rate < RATE_MIN_BYTES:
        raise ValueError(f"a peer needs {RATE_MIN_BYTES * 8 // 1000}kbit at least, or 0 for no limit")
    return rate


def parse_amount(text: str) -> int:
    """Return the bytes of an amount such as `200GB`; 0, or an empty text, is no limit.

    Raises:
        ValueError: it is none; says what is expected.
    """
    if text in ("", "0"):
        return 0
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[3].lower() != "b" or found[4] or _bytes_of(found) < 1:
        raise ValueError("expected an amount such as 200GB or 500MB, or 0 for no limit")
    return int(_bytes_of(found))


def format_rate(bytes_per_second: float) -> str:
    """Return a rate for people, in bits as lines are sold."""
    kbit = bytes_per_second * 8 / 1000
    return f"{kbit / 1000:.3g} Mbit/s" if kbit >= 1000 else f"{kbit:.3g} kbit/s"


def format_amount(size_bytes: float) -> str:
    """Return an amount for people."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size_bytes >= size:
            return f"{size_bytes / size:.3g} {unit}"
    return f"{size_bytes / 1000:.3g} kB"


def _bytes_of(found: re.Match[str]) -> float:
    whole = float(found[1]) * _PREFIXES[(found[2] or "").lower()]
    return whole / 8 if found[3].lower() != "b" else whole
