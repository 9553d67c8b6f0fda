"""What a node of ours stores for others, and believes from others: signed records and manifests, nothing else.

Foreign values are refused even under keys that no run of ours uses. A node that kept them could be filled by strangers,
and a foreign value that expires late would shadow a run's records. What was given up: as a host in a DHT of other
software, our nodes do not carry its records.
"""

from __future__ import annotations

import math
import time

import msgspec
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from p2ptrain.config.manifest import MANIFEST_MAX_BYTES, open_manifest
from p2ptrain.errors import ManifestError
from p2ptrain.swarm.limits import Allowance, caller
from p2ptrain.swarm.records import (
    CLOCK_TOLERANCE_SECONDS,
    MANIFEST_SECONDS,
    MANIFEST_SUBKEY,
    MAX_RECORD_BYTES,
    MAX_RECORD_SECONDS,
    RecordError,
    check_record,
    key_id_of,
    manifest_key,
    peer_of,
)

VERIFIED_PER_SECOND, VERIFIED_BURST = 20.0, 200.0
"""Signatures that one caller may have us check; an honest peer brings one every 2 s, and all it holds when we meet."""
READ_PER_SECOND, READ_BURST = 1000.0, 2000.0
"""Signatures that we check of what we have asked for."""
VERDICTS_MAX = 2048

_MAX_VALUE_BYTES = max(MANIFEST_MAX_BYTES, MAX_RECORD_BYTES) + 16


class SignedRecordValidator(RecordValidatorBase):
    """Admits what `records` can verify under its subkey and key, with an expiry that is near and as signed."""

    def __init__(self) -> None:
        self._callers = Allowance(VERIFIED_PER_SECOND, VERIFIED_BURST)
        self._reading = Allowance(READ_PER_SECOND, READ_BURST)
        #: The same records come back with every read, from every replica: signatures are checked once.
        self._verdicts: dict[tuple[bytes, bytes, bytes], float | None] = {}

    def validate(self, record: DHTRecord) -> bool:
        """Whether to store or believe `record`; never raises, as hivemind expects."""
        if len(record.value) > _MAX_VALUE_BYTES:
            return False
        try:
            # hivemind hands over subkey and value as it packed them; both of ours are plain bytes.
            subkey = msgspec.msgpack.decode(record.subkey, type=bytes)
            value = msgspec.msgpack.decode(record.value, type=bytes)
        except (msgspec.MsgspecError, ValueError):
            return False
        longest = MANIFEST_SECONDS if subkey == MANIFEST_SUBKEY else MAX_RECORD_SECONDS
        if not 0 < record.expiration_time - time.time() <= longest + CLOCK_TOLERANCE_SECONDS:
            return False
        expires = self._latest_expiry(subkey, value, record.key)
        return expires is not None and (subkey == MANIFEST_SUBKEY or expires == record.expiration_time)

    def _latest_expiry(self, subkey: bytes, value: bytes, key_id: bytes) -> float | None:
        """The expiry that is signed, or any for a manifest; None when it does not belong there or is not checked."""
        known = (subkey, value, key_id)
        if known not in self._verdicts:
            peer = caller.get()
            if not (self._reading.take() if peer is None else self._callers.take(peer)):
                return None
            self._verdicts[known] = _signed_expiry(subkey, value, key_id)
            if len(self._verdicts) > VERDICTS_MAX:
                del self._verdicts[next(iter(self._verdicts))]
        return self._verdicts[known]


def _signed_expiry(subkey: bytes, value: bytes, key_id: bytes) -> float | None:
    try:
        if subkey == MANIFEST_SUBKEY:
            _, run_id = open_manifest(value)
            return math.inf if key_id_of(manifest_key(run_id)) == key_id else None
        peer_id = peer_of(subkey)
        return None if peer_id is None else check_record(value, key_id, peer_id)
    except (RecordError, ManifestError):
        return None
