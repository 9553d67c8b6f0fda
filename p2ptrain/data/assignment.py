"""Which sequences a peer reads: a pure function of the run's nonce, the peer's id and its own count.

No server hands out data, and a peer that restarts from its count reads on where it was. Offsets are uniform over the
text and drawn with replacement: that needs no agreement and no state, and costs some repetition (after one epoch's
worth of sequences a fraction 1/e, 37 %, of the text is still unseen, whether by one peer or by many).
"""

from __future__ import annotations

import hashlib

from p2ptrain.errors import DataError


def sequence_offset(nonce: bytes, peer_id: bytes, count: int, tokens: int, context: int) -> int:
    """First token of the `count`-th sequence that a peer reads; the sequence is the `context + 1` tokens from there.

    Args:
        nonce: of the run [16 bytes].
        peer_id: any bytes.
        count: sequences this peer has read before, from 0.
        tokens: length of the training text.

    Raises:
        DataError: the text is shorter than one sequence.
    """
    places = tokens - context
    if places < 1:
        raise DataError(
            f"a text of {tokens} tokens has no sequence of {context + 1}", hint="use more text, or a shorter context"
        )
    counter = count.to_bytes(8, "little") + len(nonce).to_bytes(2, "little")
    digest = hashlib.sha256(b"p2ptrain data 1\0" + counter + nonce + peer_id).digest()
    # 128 bits over at most 2**34 places: the bias of the remainder is below 2**-94.
    return int.from_bytes(digest[:16], "little") % places


def sequence_offsets(nonce: bytes, peer_id: bytes, count: int, how_many: int, tokens: int, context: int) -> list[int]:
    """`sequence_offset` of counts `count` to `count + how_many - 1`."""
    return [sequence_offset(nonce, peer_id, one, tokens, context) for one in range(count, count + how_many)]
