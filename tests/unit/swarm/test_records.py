"""A record holds for one key, one peer, one kind and one time, and any bytes at all can be looked at."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hivemind.dht import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.utils import MSGPackSerializer
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.swarm import guards
from p2ptrain.swarm.identity import Identity, new_identity
from p2ptrain.swarm.records import (
    MANIFEST_SUBKEY,
    MAX_RECORD_BYTES,
    MAX_RECORD_SECONDS,
    MISSING_MAX,
    EvaluationRecord,
    MissingRecord,
    PeerRecord,
    RecordError,
    RefusedRecord,
    RunRecord,
    check_record,
    encode_record,
    key_id_of,
    missing_key,
    open_record,
    peer_of,
    peers_key,
    subkey_of,
)
from p2ptrain.swarm.validator import SignedRecordValidator

NOW = 1_800_000_000.0
RUN = bytes(range(32))
KEY = peers_key(RUN)
ME = new_identity()


def peer_record(identity: Identity = ME, **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "run_id": RUN,
        "time": NOW,
        "name": "laptop",
        "state": "training",
        "role": "member",
        "round": 7,
        "state_id": bytes(32),
        "total": 21,
        "loss": 4.5,
    }
    return PeerRecord(**(fields | changes))


def refused(**changes: Any) -> RefusedRecord:
    fields = {"round": 90, "total": 400, "donor": "8Jkwp3Zq", "why": "0 of 3 members behind it", "age_seconds": 12}
    return RefusedRecord(**(fields | changes))  # type: ignore[arg-type]


def evaluation(**changes: Any) -> EvaluationRecord:
    fields = {"round": 50, "state_id": bytes(32), "figures": {"bits_per_byte": 1.4}, "tokens": 9, "seconds": 0.5}
    return EvaluationRecord(**(fields | changes))  # type: ignore[arg-type]


def encoded(**changes: Any) -> bytes:
    return encode_record(ME, KEY, peer_record(**changes), NOW + 30)


@given(
    name=st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=64),
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    total=st.integers(0, 2**63 - 1),
)
def test_a_record_comes_back_as_it_was(name: str, loss: float | None, total: int) -> None:
    record = peer_record(name=name, loss=loss, total=total, refused=refused(total=total), evaluation=evaluation())
    data = encode_record(ME, KEY, record, NOW + 30)
    assert open_record(data, KEY, ME.peer_id, PeerRecord, now=NOW) == record


@given(position=st.integers(0), bit=st.integers(0, 7))
def test_no_bit_of_a_record_can_be_changed(position: int, bit: int) -> None:
    data = bytearray(encoded())
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(RecordError):
        open_record(bytes(data), KEY, ME.peer_id, PeerRecord, now=NOW)


def test_an_encrypted_record_is_read_with_its_key_alone() -> None:
    secret, record = bytes(range(32)), peer_record(name="a name of some length")
    data, again = (encode_record(ME, KEY, record, NOW + 30, secret) for _ in range(2))
    assert open_record(data, KEY, ME.peer_id, PeerRecord, now=NOW, secret=secret) == record
    assert data != again and len(data) - len(encode_record(ME, KEY, record, NOW + 30)) in range(28, 32)
    assert b"a name of" not in data
    # Nodes that store it need not read it.
    assert check_record(data, key_id_of(KEY), ME.peer_id) == NOW + 30
    for wrong in (b"", bytes(32)):
        with pytest.raises(RecordError):
            open_record(data, KEY, ME.peer_id, PeerRecord, now=NOW, secret=wrong)
    # Whoever has no key publishes nothing there that counts.
    with pytest.raises(RecordError, match="not encrypted"):
        open_record(encoded(), KEY, ME.peer_id, PeerRecord, now=NOW, secret=secret)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        open_record(data, KEY, ME.peer_id, PeerRecord, now=NOW)


def test_a_record_cannot_be_moved_to_another_key_peer_or_kind() -> None:
    data, other = encoded(), new_identity()
    with pytest.raises(RecordError, match="not signed"):
        open_record(data, peers_key(bytes(32)), ME.peer_id, PeerRecord, now=NOW)
    with pytest.raises(RecordError, match="not signed"):
        open_record(data, KEY, other.peer_id, PeerRecord, now=NOW)
    with pytest.raises(RecordError, match="kind"):
        open_record(data, KEY, ME.peer_id, RunRecord, now=NOW)


def test_a_peer_cannot_speak_for_another() -> None:
    other = new_identity()
    with pytest.raises(RecordError, match="itself"):
        encode_record(ME, KEY, peer_record(other), NOW + 30)


def test_a_record_ends_and_does_not_come_from_the_future() -> None:
    with pytest.raises(RecordError, match="expired"):
        open_record(encoded(), KEY, ME.peer_id, PeerRecord, now=NOW + 31)
    with pytest.raises(RecordError, match="future"):
        open_record(encoded(time=NOW + 10), KEY, ME.peer_id, PeerRecord, now=NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "x" * 65},
        {"name": "\x1b[2J"},
        {"state": "sleeping"},
        {"round": -1},
        {"loss": math.nan},
        {"tokens_per_second": math.inf},
        {"state_id": b"short"},
        {"addresses": ["/ip4/127.0.0.1/tcp/1"] * 17},
        {"addresses": ["/dns4/a b/tcp/1"]},
        {"refused": refused(donor="12345678\x1b")},
        {"refused": refused(donor="0OIl0OIl")},
        {"refused": refused(donor="")},
        {"refused": refused(why="x" * 121)},
        {"refused": refused(why="\x1b[2J")},
        {"refused": refused(round=-1)},
        {"refused": refused(total=2**63)},
        {"refused": refused(age_seconds=-1)},
        {"refused": refused(age_seconds=math.inf)},
        {"evaluation": evaluation(round=-1)},
        {"evaluation": evaluation(state_id=b"short")},
        {"evaluation": evaluation(tokens=2**63)},
        {"evaluation": evaluation(seconds=-1.0)},
        {"evaluation": evaluation(seconds=math.inf)},
        {"evaluation": evaluation(figures={})},
        {"evaluation": evaluation(figures={"bits_per_byte": math.nan})},
        {"evaluation": evaluation(figures={"bits_per_byte": -math.inf})},
        {"evaluation": evaluation(figures={"bits_per_byte": "1.4"})},
        {"evaluation": evaluation(figures={f"f{n}": 1.0 for n in range(9)})},
        {"evaluation": evaluation(figures={"x" * 33: 1.0})},
        {"evaluation": evaluation(figures={"\x1b[2J": 1.0})},
        {"evaluation": evaluation(figures={"": 1.0})},
    ],
)
def test_impossible_values_are_not_published(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        encoded(**changes)


def test_who_says_that_peers_are_missing_names_some_and_no_crowd() -> None:
    def missing(count: int) -> MissingRecord:
        peers = {new_identity().peer_id: NOW - 6.0 for _ in range(count)}
        return MissingRecord(peer_id=ME.peer_id, run_id=RUN, time=NOW, peers=peers)

    key = missing_key(RUN)
    data = encode_record(ME, key, said := missing(MISSING_MAX), NOW + 20)
    assert open_record(data, key, ME.peer_id, MissingRecord, now=NOW) == said
    for count in (0, MISSING_MAX + 1):
        with pytest.raises(RecordError):
            encode_record(ME, key, missing(count), NOW + 20)


def test_a_record_that_expires_on_its_way_takes_no_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    validating: Any = SimpleNamespace(record_validator=SignedRecordValidator(), serializer=MSGPackSerializer)
    found = DictionaryDHTValue()
    for identity, left in ((ME, 20.0), (new_identity(), 5.0)):
        data = encode_record(identity, KEY, peer_record(identity, time=now), expires := now + left)
        found.store(subkey_of(identity.peer_id), MSGPackSerializer.dumps(data), expires)
    monkeypatch.setattr(guards, "get_dht_time", lambda: now + 6.0)
    assert guards._validate_dictionary(validating, key_id_of(KEY), found)
    assert list(found.data) == [subkey_of(ME.peer_id)]


def test_later_versions_may_add_fields() -> None:
    class LaterRecord(PeerRecord, frozen=True, kw_only=True):
        wishes: str = "more rounds"

    record = LaterRecord(**msgspec.structs.asdict(peer_record()))
    data = encode_record(ME, KEY, record, NOW + 30)
    assert open_record(data, KEY, ME.peer_id, PeerRecord, now=NOW) == peer_record()


def test_a_record_has_at_most_8_kib() -> None:
    class Large(PeerRecord, frozen=True, kw_only=True):
        ballast: bytes

    large = Large(**msgspec.structs.asdict(peer_record()), ballast=bytes(MAX_RECORD_BYTES))
    with pytest.raises(RecordError, match="8192"):
        encode_record(ME, KEY, large, NOW + 30)


def test_key_ids_are_those_of_the_dht() -> None:
    assert key_id_of(KEY) == DHTID.generate(KEY.encode()).to_bytes()


@given(st.binary(max_size=60) | st.text(max_size=10) | st.none() | st.integers())
def test_subkeys_of_strangers_name_no_peer(subkey: object) -> None:
    assert peer_of(subkey) is None
    assert peer_of(subkey_of(ME.peer_id)) == ME.peer_id


class TestValidator:
    """What a node stores for others; `clock` stands still."""

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("p2ptrain.swarm.validator.time.time", lambda: NOW)

    def admits(self, value: object, *, key: str = KEY, subkey: object = None, expires: float = NOW + 30) -> bool:
        subkey = subkey_of(ME.peer_id) if subkey is None else subkey
        packed = MSGPackSerializer.dumps(subkey), MSGPackSerializer.dumps(value)
        return SignedRecordValidator().validate(DHTRecord(key_id_of(key), *packed, expires))

    def test_admits_what_its_peer_signed(self) -> None:
        assert self.admits(encoded())

    def test_refuses_another_key_peer_or_expiry(self) -> None:
        assert not self.admits(encoded(), key=peers_key(bytes(32)))
        assert not self.admits(encoded(), subkey=subkey_of(new_identity().peer_id))
        assert not self.admits(encoded(), expires=NOW + 31)

    @pytest.mark.parametrize("expires", [NOW - 1, NOW + MAX_RECORD_SECONDS + 10, math.inf, math.nan])
    def test_refuses_an_expiry_that_is_over_or_far(self, expires: float) -> None:
        value = encode_record(ME, KEY, peer_record(), expires)
        assert not self.admits(value, expires=expires)

    @pytest.mark.parametrize("subkey", ["text", 3, (1, 2), b"p2ptrain1:", MANIFEST_SUBKEY])
    def test_refuses_what_is_filed_under_no_peer(self, subkey: object) -> None:
        assert not self.admits(encoded(), subkey=subkey)

    @given(value=st.binary(max_size=100), subkey=st.binary(max_size=60), expires=st.floats())
    def test_never_raises(self, value: bytes, subkey: bytes, expires: float) -> None:
        record = DHTRecord(key_id_of(KEY), subkey, value, expires)
        assert SignedRecordValidator().validate(record) is False

    def test_refuses_a_plain_value_that_would_shadow_a_runs_records(self) -> None:
        record = DHTRecord(key_id_of(KEY), MSGPackSerializer.dumps(None), MSGPackSerializer.dumps(b"x"), NOW + 30)
        assert not SignedRecordValidator().validate(record)
