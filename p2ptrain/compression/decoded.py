"""Payloads decoded once, though a round needs each up to three times.

A contribution is decoded when it arrives, to know that it is well-formed, and when its part is reduced; a reply when it
arrives, when the sealed round that names it is checked, and when it is applied. What was decoded last is kept, up to
`MEMORY_BYTES` for all of a process: a round of four peers with 100M parameters. Where a round is larger, its payloads
are decoded again as before. What is not well-formed is never kept. What a peer wrote and reads itself (its contribution
to a part that it reduces, the reply of that part) need not be decoded at all: `wrote_contribution`, `wrote_reply`.

Any thread. What is returned is shared, and cannot be written to.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from cachetools import LRUCache, cached
from cachetools.keys import hashkey
from numpy.typing import NDArray

from p2ptrain.compression import wire
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.wire import Coefficients, ReplyContent

MEMORY_BYTES = 64 * 1024 * 1024
_OVERHEAD_BYTES = 2048
"""Of each, beside its arrays: objects, key, and the payload of a small part."""
_Decoded = Coefficients | ReplyContent


def _arrays(of: _Decoded) -> tuple[NDArray[Any], ...]:
    if isinstance(of, Coefficients):
        return of.chunk, of.index, of.value
    return *_arrays(of.coefficients), of.byte, of.scale


def _shared(of: _Decoded) -> None:
    for array in _arrays(of):
        array.flags.writeable = False


def _bytes(of: _Decoded) -> int:
    return _OVERHEAD_BYTES + sum(array.nbytes for array in _arrays(of))


_kept: LRUCache[Any, Any] = LRUCache(MEMORY_BYTES, getsizeof=_bytes)
_lock = threading.Lock()
# What is asked for is part of the key: the same bytes may be asked for as one and as the other.
_contribution_key, _reply_key = partial(hashkey, "contribution"), partial(hashkey, "reply")


@cached(_kept, _contribution_key, _lock)
def contribution(data: bytes, codec: Codec, start: int, end: int) -> Coefficients:
    """Decode as `wire.decode_contribution`."""
    found = wire.decode_contribution(data, codec, start, end)
    _shared(found)
    return found


@cached(_kept, _reply_key, _lock)
def reply(data: bytes, codec: Codec, start: int, end: int, members: int) -> ReplyContent:
    """Decode as `wire.decode_reply`."""
    found = wire.decode_reply(data, codec, start, end, members)
    _shared(found)
    return found


def wrote_contribution(data: bytes, codec: Codec, holds: Coefficients) -> None:
    """Have `contribution` find what these bytes of ours hold; it cannot be written to from now on."""
    _keep(_contribution_key(data, codec, holds.start, holds.end), holds)


def wrote_reply(data: bytes, codec: Codec, members: int, holds: ReplyContent) -> None:
    """Have `reply` find what these bytes of ours hold; it cannot be written to from now on."""
    _keep(_reply_key(data, codec, holds.coefficients.start, holds.coefficients.end, members), holds)


def _keep(key: Any, holds: _Decoded) -> None:
    _shared(holds)
    if _bytes(holds) <= MEMORY_BYTES:
        with _lock:
            _kept[key] = holds
