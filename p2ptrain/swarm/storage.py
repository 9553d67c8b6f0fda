"""What one node stores for others: some from each caller and each signer, so that nobody's records drive out others'.

A record is first-hand when its signer itself has brought it. Others bring it second-hand: an honest node does so for a
node that it has just met, and whoever makes up identities has no other way without a connection for each. A second-hand
record makes room for a first-hand one; nothing else that is stored goes before it expires, so a success is one.

What was given up: with a connection for each of hundreds of identities, a stranger still fills a node.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue

from p2ptrain.swarm.limits import caller
from p2ptrain.swarm.records import peer_of

MAX_STORED_KEYS = 4096
"""Keys that a node stores for others."""
OWN_KEYS = 64
"""Keys of its own, beyond these."""
MAX_DICTIONARY_BYTES = 1024 * 1024
"""All records under one key: a reader asks for them in one unary response."""
RECORDS_PER_KEY = 512
RECORDS_PER_CALLER = 64
"""Second-hand ones."""
KEYS_PER_CALLER = 8
"""Under which a caller was the first to store something."""
KEYS_PER_SIGNER = 8
_PURGE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Origin:
    """Who has brought a record, who has signed it, whether it was the first under its key, when it expires."""

    caller: bytes | None
    signer: bytes | None
    first: bool
    expires: float

    @property
    def first_hand(self) -> bool:
        return self.caller in (None, self.signer)


class BoundedStorage(DHTLocalStorage):
    """hivemind's storage with the limits of this module; what is listed already may refresh."""

    def __init__(self, maxsize: int | None = None) -> None:
        super().__init__((maxsize or MAX_STORED_KEYS) + OWN_KEYS)
        #: {(key, subkey): its origin}, also for a while after it has expired
        self._origins: dict[tuple[Any, Any], _Origin] = {}
        #: records or keys that count against ("caller", peer), ("key", peer) and ("signer", peer)
        self._counts: Counter[tuple[str, bytes | None]] = Counter()
        self._purged_at = 0.0
        #: says of a key that others bring, and that is not stored here yet, whether this node has enough of its kind
        self.is_full: Callable[[Any], bool] = lambda key: False

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """As in hivemind; False when a record may not be stored, or does not fit under its key."""
        present = self.get(key)
        records = present.value if present is not None and isinstance(present.value, DictionaryDHTValue) else None
        old = None if records is None else records.get(subkey)
        if old is not None and old.expiration_time >= expiration_time:
            return False
        known = self._origins.get((key, subkey)) if old is not None else None
        first = known.first if known is not None else records is None
        origin = _Origin(caller.get(), peer_of(subkey), first, expiration_time)
        if old is None and not self._may_bring(origin):
            return False
        if records is None and origin.caller is not None and self.is_full(key):
            return False
        if records is not None and not self._make_room(key, records, subkey, len(value), origin):
            return False
        if not super().store_subkey(key, subkey, value, expiration_time):
            return False
        if known is not None and not origin.first_hand:
            origin = _Origin(known.caller, origin.signer, first, expiration_time)
        self._note(key, subkey, origin)
        return True

    def _may_bring(self, origin: _Origin) -> bool:
        if origin.caller is None:
            return True
        self._purge()
        return (
            (origin.first_hand or self._counts["caller", origin.caller] < RECORDS_PER_CALLER)
            and (not origin.first or self._counts["key", origin.caller] < KEYS_PER_CALLER)
            and (not origin.first or len(self) < self.maxsize - OWN_KEYS)
            and (origin.signer is None or self._counts["signer", origin.signer] < KEYS_PER_SIGNER)
        )

    def _make_room(self, key: Any, records: DictionaryDHTValue, subkey: Any, size: int, origin: _Origin) -> bool:
        """Whether a record of `size` bytes fits, when second-hand ones are gone if need be."""
        sizes = {other: len(item.value) for other, item in records.items() if other != subkey}
        used, count = sum(sizes.values()) + size, len(sizes) + 1
        if used <= MAX_DICTIONARY_BYTES and count <= RECORDS_PER_KEY:
            return True
        leaving = []
        if origin.first_hand:
            for other, length in sizes.items():
                whose = self._origins.get((key, other))
                if whose is not None and not whose.first_hand:
                    leaving.append(other)
                    used, count = used - length, count - 1
                    if used <= MAX_DICTIONARY_BYTES and count <= RECORDS_PER_KEY:
                        break
        if used > MAX_DICTIONARY_BYTES or count > RECORDS_PER_KEY:
            return False
        for other in leaving:
            del records[other]
            self._forget(key, other)
        return True

    def _note(self, key: Any, subkey: Any, origin: _Origin) -> None:
        self._forget(key, subkey)
        self._origins[key, subkey] = origin
        self._counts.update(_counted(origin))

    def _forget(self, key: Any, subkey: Any) -> None:
        origin = self._origins.pop((key, subkey), None)
        if origin is not None:
            for counted in _counted(origin):
                self._counts[counted] -= 1
                if not self._counts[counted]:
                    del self._counts[counted]

    def _purge(self) -> None:
        now = time.time()
        if now >= self._purged_at + _PURGE_SECONDS:
            self._purged_at = now
            for key, subkey in [known for known, origin in self._origins.items() if origin.expires < now]:
                self._forget(key, subkey)


def _counted(origin: _Origin) -> list[tuple[str, bytes | None]]:
    kinds = {"signer": origin.signer is not None, "caller": not origin.first_hand, "key": origin.first}
    return [(kind, origin.signer if kind == "signer" else origin.caller) for kind, counts in kinds.items() if counts]
