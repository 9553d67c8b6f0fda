"""What peers publish in the DHT: typed records of at most 8 KiB, each signed by the peer whose id is its subkey.

A signature covers the key, the peer id, the kind, the time of expiry and the body, so that nobody can move a record to
another key or peer, pass it off as another kind, or keep a dead peer's record alive. A manifest needs no signer: it is
stored under the hash of itself. Cost of a record: about 130 bytes and one signature for each writing and, once in a
process, for each reader. Anyone in the DHT reads everything, except the bodies of peer records of a run with an access
list: they are encrypted with a key that only those who have the run's manifest can compute, and are 28 bytes longer.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from msgspec import Meta

from p2ptrain.swarm.identity import PEER_ID_BYTES, Identity, is_ed25519_peer_id, verify

MAX_RECORD_BYTES = 8 * 1024
PEER_RECORD_SECONDS = 30.0
"""Life of a peer's record; peers publish every few seconds."""
RUN_RECORD_SECONDS = 60.0
MISSING_RECORD_SECONDS = 20.0
MANIFEST_SECONDS = 3600.0
MAX_RECORD_SECONDS = max(PEER_RECORD_SECONDS, RUN_RECORD_SECONDS)
"""No signed record may expire later than this from now, on the clock of the node that is asked to store it."""
CLOCK_TOLERANCE_SECONDS = 3.0
"""What hivemind allows between the clocks of two nodes."""

RUNS_KEY = "p2ptrain/1/runs"
SUBKEY_PREFIX = b"p2ptrain1:"
MANIFEST_SUBKEY = SUBKEY_PREFIX + b"manifest"

ID_END, REASON_MAX = 8, 120
"""Characters of a peer id, and of a text that says why."""

_DOMAIN = b"p2ptrain record 1\0"
_NONCE_BYTES = 12

# A stranger chooses these texts and a terminal prints them: no control characters.
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$"
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=_PRINTABLE)]
Text = Annotated[str, Meta(max_length=128, pattern=_PRINTABLE)]
Address = Annotated[str, Meta(max_length=256, pattern=r"^/[\x21-\x7e]*$")]
Reason = Annotated[str, Meta(max_length=REASON_MAX, pattern=_PRINTABLE)]
IdEnd = Annotated[str, Meta(min_length=ID_END, max_length=ID_END, pattern=r"^[1-9A-HJ-NP-Za-km-z]*$")]
"""The last characters of a peer id: enough for people to tell peers apart."""
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
PeerId = Annotated[bytes, Meta(min_length=PEER_ID_BYTES, max_length=PEER_ID_BYTES)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Quantity = Annotated[float, Meta(ge=0.0)]

MISSING_MAX = 16
"""Peers that one record says are missing."""
SHELVES_MAX = 1024
"""Keys over which a run's records are spread."""
FIGURES_MAX = 8
"""Figures of one evaluation."""
FigureName = Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,31}\Z")]

PeerState = Literal["joining", "syncing", "training", "solo", "paused", "leaving", "finished"]


class RecordError(ValueError):
    """A record that is malformed, expired, too large, or not signed by the peer it names."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every record has. Fields that this version does not know are ignored: later versions may add some."""

    kind: ClassVar[str]

    peer_id: PeerId
    """The publisher, who must be the signer."""
    run_id: Hash
    time: float
    """Unix seconds on the publisher's clock."""


class RefusedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The branch that a peer's fork choice refused last."""

    round: Count
    """Of its last seal."""
    total: Count
    donor: IdEnd
    why: Reason
    age_seconds: Count
    """Since then, when the record was published."""


class EvaluationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer says it has measured of the run's model. It is that peer's word: nobody has checked it."""

    round: Count
    state_id: Hash
    """Of the model that it measured."""
    figures: Annotated[dict[FigureName, float], Meta(min_length=1, max_length=FIGURES_MAX)]
    """By name: `bits_per_byte` and `perplexity` (a token) on held-out text, or what a model's owner has chosen."""
    tokens: Count = 0
    """Tokens of held-out text that it measured on; 0 where it is no such text."""
    seconds: Quantity = 0.0
    """What it took."""


class RoundTime(msgspec.Struct, frozen=True, array_like=True):
    """Where a peer's last round went, in milliseconds."""

    computing: Count = 0
    exchange: Count = 0
    """From handing its contribution over until all replies were here."""
    disk: Count = 0
    waiting: Count = 0
    """What is left: for others, and for the seal."""


class PeerRecord(Record, frozen=True, kw_only=True):
    """What a peer says of itself, every few seconds."""

    kind: ClassVar[str] = "peer"

    name: Name
    state: PeerState
    role: Literal["member", "learner"]
    round: Count
    """Rounds applied."""
    state_id: Hash
    """Hash of the last seal applied."""
    total: Count
    """The chain's total at that seal."""
    tokens_per_second: Quantity = 0.0
    bytes_sent_per_round: Count = 0
    """In the last round, framing included, to itself excluded."""
    bytes_received_per_round: Count = 0
    loss: float | None = None
    """Nats a token, on what it trained on in the last round; None before the first. No held-out text has part in it."""
    evaluation: EvaluationRecord | None = None
    """What it has measured last; None: nothing since it started."""
    round_time: RoundTime | None = None
    """None: before its first round."""
    diverged: Reason = ""
    """Why the run has diverged, by its train loss; empty: it has not."""
    device: Text = ""
    version: Text = ""
    addresses: Annotated[list[Address], Meta(max_length=16)] = []
    """Multiaddrs with /p2p/ID that others may dial; empty when nobody can."""
    grant: Annotated[bytes, Meta(max_length=1024)] = b""
    """The encoded grant by which a guest is in the run, for peers whose chain lacks it."""
    shelves: Annotated[int, Meta(ge=1, le=SHELVES_MAX)] = 1
    """Over how many keys it takes the records of the run's peers to be spread."""
    refused: RefusedRecord | None = None
    """None: it has refused no branch since it started."""

    def last_seen_seconds(self, now: float) -> float:
        """Seconds since it was published, by the reader's clock `now` (Unix seconds); never negative."""
        return max(0.0, now - self.time)


class RunRecord(Record, frozen=True, kw_only=True):
    """A run that this peer takes part in, in the index of all runs of a DHT."""

    kind: ClassVar[str] = "run"

    name: Name
    protocol: Count
    round: Count
    state_id: Hash
    members: Count


class MissingRecord(Record, frozen=True, kw_only=True):
    """Peers whose records this one keeps for others, and which do not renew them. Nobody takes that for a fact: it
    tells whoever looks where to look next."""

    kind: ClassVar[str] = "missing"

    peers: Annotated[dict[PeerId, float], Meta(min_length=1, max_length=MISSING_MAX)]
    """Each with the time of its last record, in Unix seconds."""


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: Literal[1]
    kind: Annotated[str, Meta(max_length=16)]
    expires: float
    body: bytes
    signature: bytes


R = TypeVar("R", bound=Record)

_envelopes = msgspec.msgpack.Decoder(_Envelope)
_encoder = msgspec.msgpack.Encoder()


def peers_key(run_id: bytes) -> str:
    """Where the peers of a run publish `PeerRecord`s."""
    return f"p2ptrain/1/{run_id.hex()}/peers"


def missing_key(run_id: bytes) -> str:
    """Where the peers of a large run publish `MissingRecord`s."""
    return f"p2ptrain/1/{run_id.hex()}/missing"


def manifest_key(run_id: bytes) -> str:
    """Where the signed manifest of a run is."""
    return f"p2ptrain/1/{run_id.hex()}/manifest"


def subkey_of(peer_id: bytes) -> bytes:
    """The subkey under which `peer_id`, and nobody else, may publish."""
    return SUBKEY_PREFIX + peer_id


def peer_of(subkey: object) -> bytes | None:
    """The peer id [38 bytes] in a subkey; None when it is not a peer's."""
    if isinstance(subkey, bytes) and subkey.startswith(SUBKEY_PREFIX):
        peer_id = subkey[len(SUBKEY_PREFIX) :]
        if is_ed25519_peer_id(peer_id):
            return peer_id
    return None


def key_id_of(key: str) -> bytes:
    """The id [20 bytes] under which the DHT files `key`, which is all that a storing node sees of it."""
    return hashlib.sha1(key.encode(), usedforsecurity=False).digest()


def encode_record(identity: Identity, key: str, record: Record, expires: float, secret: bytes = b"") -> bytes:
    """Signs `record` for `key` until `expires` (Unix seconds), its body encrypted with `secret` unless that is empty.

    RecordError when it would exceed 8 KiB, names another peer or has impossible values: msgspec checks none on
    construction, so the record is read back once.
    """
    if record.peer_id != identity.peer_id:
        raise RecordError("a peer can publish records of itself only")
    body = plain = _encoder.encode(record)
    if secret:
        nonce = os.urandom(_NONCE_BYTES)
        body = nonce + ChaCha20Poly1305(secret).encrypt(nonce, plain, None)
    message = _signed_message(key_id_of(key), identity.peer_id, record.kind, expires, body)
    data = _encoder.encode(_Envelope(1, record.kind, expires, body, identity.sign(message)))
    if len(data) > MAX_RECORD_BYTES:
        raise RecordError(f"a record of {len(data)} bytes, where {MAX_RECORD_BYTES} are allowed")
    _decode_body(plain, type(record))
    return data


def open_record(data: object, key: str, peer_id: bytes, record_type: type[R], *, now: float, secret: bytes = b"") -> R:
    """Checks and reads a record found under `key` and the subkey of `peer_id`; RecordError says what is wrong.

    `now` is in Unix seconds. Expired records, and those dated ahead by more than clocks may differ, are refused.
    """
    if not isinstance(data, bytes):
        raise RecordError("not a record")
    envelope = _open_envelope(data, key_id_of(key), peer_id)
    if envelope.kind != record_type.kind:
        raise RecordError(f"a record of kind {envelope.kind!r}, where {record_type.kind!r} was expected")
    if envelope.expires < now:
        raise RecordError("expired")
    record = _decode_body(_decrypted(envelope.body, secret) if secret else envelope.body, record_type)
    if record.peer_id != peer_id:
        raise RecordError("names another peer than its signer")
    if record.time > now + CLOCK_TOLERANCE_SECONDS:
        raise RecordError("dated in the future")
    return record


def check_record(data: bytes, key_id: bytes, peer_id: bytes) -> float:
    """Checks size, form and signature without knowing the key's name; returns the signed time of expiry.

    For nodes that store records of runs they know nothing of. Raises RecordError.
    """
    return _open_envelope(data, key_id, peer_id).expires


def _open_envelope(data: bytes, key_id: bytes, peer_id: bytes) -> _Envelope:
    if len(data) > MAX_RECORD_BYTES:
        raise RecordError(f"a record of {len(data)} bytes, where {MAX_RECORD_BYTES} are allowed")
    try:
        envelope = _envelopes.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise RecordError(f"not a record: {error}") from error
    message = _signed_message(key_id, peer_id, envelope.kind, envelope.expires, envelope.body)
    if not verify(peer_id, message, envelope.signature):
        raise RecordError("not signed by the peer it is filed under")
    return envelope


def _decrypted(body: bytes, secret: bytes) -> bytes:
    try:
        return ChaCha20Poly1305(secret).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], None)
    except (InvalidTag, ValueError) as error:
        raise RecordError("not encrypted with the run's key") from error


def _signed_message(key_id: bytes, peer_id: bytes, kind: str, expires: float, body: bytes) -> bytes:
    return _DOMAIN + _encoder.encode((key_id, peer_id, kind, expires, body))


def _decode_body(body: bytes, record_type: type[R]) -> R:
    try:
        record = msgspec.msgpack.decode(body, type=record_type)
    except (msgspec.MsgspecError, ValueError) as error:
        raise RecordError(f"not a valid {record_type.kind} record: {error}") from error
    for name, value in _numbers("", record):
        if not math.isfinite(value):
            raise RecordError(f"not a valid {record_type.kind} record: {name} is not finite")
    return record


def _numbers(name: str, value: object) -> Iterator[tuple[str, float]]:
    """Yield the floats in a record, and in what it holds, with their names."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, msgspec.Struct):
        for field in value.__struct_fields__:
            yield from _numbers(field, getattr(value, field))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(str(key), inner)
