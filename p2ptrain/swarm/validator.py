"""What a node of ours stores for others, and believes from others: signed records and manifests, nothing else.

Foreign values are refused even under keys that no run of ours uses. A node that kept them could be filled by strangers,
and a foreign value that expires late would shadow a run's records. What was given up: as a host in a DHT of other
software, our nodes do not carry its records.
"""

from __future__ import annotations

import functools
import time

import msgspec
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from p2ptrain.config.manifest import MANIFEST_MAX_BYTES, open_manifest
from p2ptrain.errors import ManifestError
from p2ptrain.swarm.records import (
    CLOCK_TOLERANCE_SECONDS,
    MANIFEST_SUBKEY,
    MAX_RECORD_BYTES,
    MAX_RECORD_SECONDS,
    RecordError,
    check_record,
    key_id_of,
    manifest_key,
    peer_of,
)

_MAX_VALUE_BYTES = max(MANIFEST_MAX_BYTES, MAX_RECORD_BYTES) + 16


class SignedRecordValidator(RecordValidatorBase):
    """Admits what `records` can verify under its subkey and key, with an expiry that is near and as signed."""

    def validate(self, record: DHTRecord) -> bool:
        """Whether to store or believe `record`; never raises, as hivemind expects."""
        remaining = record.expiration_time - time.time()
        if not 0 < remaining <= MAX_RECORD_SECONDS + CLOCK_TOLERANCE_SECONDS or len(record.value) > _MAX_VALUE_BYTES:
            return False
        try:
            # hivemind hands over subkey and value as it packed them; both of ours are plain bytes.
            subkey = msgspec.msgpack.decode(record.subkey, type=bytes)
            value = msgspec.msgpack.decode(record.value, type=bytes)
        except (msgspec.MsgspecError, ValueError):
            return False
        if subkey == MANIFEST_SUBKEY:
            return _manifest_belongs(value, record.key)
        peer_id = peer_of(subkey)
        return peer_id is not None and _signed_expiry(value, record.key, peer_id) == record.expiration_time


# The same records come back with every read, from every replica: signatures are checked once.
@functools.lru_cache(maxsize=4096)
def _signed_expiry(value: bytes, key_id: bytes, peer_id: bytes) -> float | None:
    try:
        return check_record(value, key_id, peer_id)
    except RecordError:
        return None


@functools.lru_cache(maxsize=64)
def _manifest_belongs(value: bytes, key_id: bytes) -> bool:
    try:
        _, run_id = open_manifest(value)
    except ManifestError:
        return False
    return key_id_of(manifest_key(run_id)) == key_id
