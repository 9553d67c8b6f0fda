"""Claims: what strangers bring is bounded, what a node has said it stores stays, and honest records refresh."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hivemind.dht import DHTID

from p2ptrain.swarm import storage as storage_module
from p2ptrain.swarm.limits import caller
from p2ptrain.swarm.records import SUBKEY_PREFIX, subkey_of
from p2ptrain.swarm.storage import (
    KEYS_PER_CALLER,
    KEYS_PER_SIGNER,
    MAX_DICTIONARY_BYTES,
    RECORDS_PER_CALLER,
    RECORDS_PER_KEY,
    BoundedStorage,
)

KEY = DHTID.generate(b"key")


def peer(number: int) -> bytes:
    return bytes.fromhex("002408011220") + number.to_bytes(32, "big")


@contextmanager
def called_by(who: bytes) -> Iterator[None]:
    token = caller.set(who)
    try:
        yield
    finally:
        caller.reset(token)


def soon(seconds: float = 30.0) -> float:
    return time.time() + seconds


def brings(
    storage: BoundedStorage,
    who: bytes,
    signers: range,
    *,
    key: DHTID = KEY,
    value: bytes = b"value",
    in_seconds: float = 30.0,
) -> int:
    """How many of these signers' records are stored when `who` brings them."""
    with called_by(who):
        return sum(storage.store_subkey(key, subkey_of(peer(n)), value, soon(in_seconds)) for n in signers)


def test_bytes_under_one_key_are_bounded_but_records_refresh() -> None:
    storage, size = BoundedStorage(), MAX_DICTIONARY_BYTES // 4
    assert all(storage.store_subkey(KEY, name, bytes(size), soon()) for name in b"abcd")
    assert not storage.store_subkey(KEY, b"e", b"one more", soon(31))
    assert storage.store_subkey(KEY, b"a"[0], bytes(size), soon(31))
    assert not storage.store_subkey(KEY, b"a"[0], bytes(size + 1), soon(32)), "nor does one grow beyond it"


def test_a_caller_brings_some_records_and_founds_some_keys() -> None:
    storage, stranger = BoundedStorage(), peer(0)
    assert brings(storage, stranger, range(1, 1000)) == RECORDS_PER_CALLER
    assert brings(storage, stranger, range(1, 1000), in_seconds=31) == RECORDS_PER_CALLER, "these refresh"
    storage = BoundedStorage()
    keys = [DHTID.generate(b"%d" % n) for n in range(100)]
    assert sum(brings(storage, stranger, range(n, n + 1), key=key) for n, key in enumerate(keys, 1)) == KEYS_PER_CALLER


def test_a_signer_is_stored_under_some_keys_whoever_brings_it() -> None:
    storage = BoundedStorage()
    stored = [brings(storage, peer(n), range(1, 2), key=DHTID.generate(b"%d" % n)) for n in range(2, 100)]
    assert sum(stored) == KEYS_PER_SIGNER


def test_a_first_hand_record_drives_out_one_that_was_brought_by_another() -> None:
    storage, carriers = BoundedStorage(), RECORDS_PER_KEY // RECORDS_PER_CALLER
    for carrier in range(carriers):
        signers = range(1000 * (carrier + 1), 1000 * (carrier + 1) + RECORDS_PER_CALLER)
        assert brings(storage, peer(carrier), signers) == RECORDS_PER_CALLER
    assert brings(storage, peer(carriers), range(7, 8)) == 0, "it is full"
    assert brings(storage, peer(7), range(7, 8)) == 1
    assert subkey_of(peer(7)) in storage.get(KEY).value
    assert len(storage.get(KEY).value) == RECORDS_PER_KEY


def test_what_was_stored_outlives_any_number_of_keys_that_expire_later() -> None:
    storage = BoundedStorage(maxsize=100)
    assert brings(storage, peer(1), range(1, 2), in_seconds=5) == 1
    assert storage.store_subkey(DHTID.generate(b"own"), subkey_of(peer(2)), b"value", soon(5))
    stored = 0
    for stranger in range(10, 60):
        for n in range(KEYS_PER_CALLER):
            key = DHTID.generate(b"%d %d" % (stranger, n))
            stored += brings(storage, peer(stranger), range(stranger, stranger + 1), key=key, in_seconds=3600)
    assert stored == 98
    assert KEY in storage and DHTID.generate(b"own") in storage
    assert storage.store_subkey(DHTID.generate(b"another of our own"), subkey_of(peer(2)), b"value", soon(5))
    assert KEY in storage


def test_a_full_node_takes_no_other_key_of_that_kind_and_renews_those_that_it_has() -> None:
    storage, other = BoundedStorage(), DHTID.generate(b"other")
    assert brings(storage, peer(1), range(1, 2)) == 1
    storage.is_full = lambda key: key in (KEY, other)
    assert brings(storage, peer(2), range(2, 3)) == 1, "the key is here already"
    assert brings(storage, peer(2), range(2, 3), key=other) == 0
    assert brings(storage, peer(2), range(2, 3), key=DHTID.generate(b"of another kind")) == 1
    assert storage.store_subkey(other, subkey_of(peer(9)), b"its own", soon())


def test_what_has_expired_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_PURGE_SECONDS", 0.0)
    storage = BoundedStorage()
    assert brings(storage, peer(0), range(1, 100), in_seconds=0.05) > 0
    time.sleep(0.06)
    assert brings(storage, peer(0), range(100, 300)) == RECORDS_PER_CALLER
    assert len(storage._origins) == RECORDS_PER_CALLER


def test_a_manifest_has_no_signer_to_count() -> None:
    storage = BoundedStorage()
    for n in range(20):
        with called_by(peer(n)):
            assert storage.store_subkey(DHTID.generate(b"%d" % n), SUBKEY_PREFIX + b"manifest", b"manifest", soon())
