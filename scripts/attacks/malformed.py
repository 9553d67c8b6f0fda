"""Malformed bytes that follow from a seed, and all that decodes what strangers send, to feed it with in this process.

    python scripts/attacks/malformed.py --messages 1000000 --seed 1

Each message begins as a real one and is spoiled in one of the ways of `Spoiler`. What is signed is spoiled first and
signed afterwards, by a key that the attacker has, so that signatures hide nothing. A decoder may return, or raise the
error that it names; whatever else it does is a fault, and so is memory that grows. The attack `malformed` of
`attack_swarm.py` sends the same bytes to real peers.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import msgspec
import numpy as np
import psutil
import torch
from attacks.forged import identity_from
from hivemind.dht.validation import DHTRecord
from lab.report import note, say

from p2ptrain import chain
from p2ptrain.calls import messages as wire_messages
from p2ptrain.calls.messages import (
    Amend,
    Answer,
    Arrived,
    AuditRequest,
    BlobHeader,
    CallError,
    ContributionHeader,
    Dial,
    Dialled,
    FileRequest,
    Follow,
    Hello,
    JoinRequest,
    News,
    PiecesHeld,
    ProofHeader,
    Relay,
    RoundsHeader,
    RoundsRequest,
    SealsHeader,
    SealsRequest,
    SnapshotOffer,
    SnapshotRequest,
    Tip,
    Welcome,
    decode_message,
)
from p2ptrain.chain import Group, Join, Key, Row, SealError, SignedSeal, evidence
from p2ptrain.chain.admission import Access, Grant, Pass, pass_message
from p2ptrain.chain.evidence import Contribution, EvidenceError, Proof
from p2ptrain.chain.sealed import SealedRoundError, check_continues, decode_sealed
from p2ptrain.compression import wire
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.selection import quantise
from p2ptrain.compression.wire import Coefficients, WireError
from p2ptrain.config.manifest import (
    PROTOCOL_VERSION,
    Manifest,
    ModelConfig,
    SignedManifest,
    open_manifest,
    run_id,
    sign_manifest,
)
from p2ptrain.data.token_file import Header, decode_header
from p2ptrain.data.tokenizer import TextTokenizer, train_tokenizer
from p2ptrain.errors import DataError, ManifestError, UsageError
from p2ptrain.history.catching_up import _check_access as check_start
from p2ptrain.simulation.forged import Branch
from p2ptrain.state.tensors import TensorFileError, pack_tensors
from p2ptrain.swarm.identity import Identity, format_peer_id, verify
from p2ptrain.swarm.invitations import Invitation, read_invitation
from p2ptrain.swarm.records import PeerRecord, RecordError, check_record, key_id_of, open_record, peers_key, subkey_of
from p2ptrain.swarm.validator import SignedRecordValidator
from p2ptrain.training.replica import Replica

WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**31,
    2**63,
    2**64 - 1,
    0.5,
    float("nan"),
    float("inf"),
    b"",
    b"\xff" * 38,
    bytes(32),
    "text",
    "",
    [],
    {},
    [[]] * 40,
    msgspec.msgpack.Ext(80, b"\x90"),
    msgspec.Raw(b"\xa3\xff\xfe\x80"),  # a text that is not UTF-8
    msgspec.Raw(b"\xd7\xff" + b"\xff" * 8),  # a time that is none
)
"""What stands in place of a field."""
LENGTHS = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x50",
    b"\xdc\xff\xff",
    b"\xc5\xff\xff",
)
"""Heads of arrays, maps, bytes, texts and extensions that claim far more than there is."""
NESTED_MAX = 100_000
RANDOM_MAX = 2000
WARM_MESSAGES, NOTE_EVERY = 20_000, 50_000


class Spoiler:
    """Makes malformed bytes of well-formed ones; which, follows from `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def spoiled(self, message: bytes, most: int = NESTED_MAX) -> bytes:
        """Return what is left of a message, at most `most` bytes more than it had."""
        chance, data = self.chance, bytearray(message)
        match chance.randrange(9) if data else 3:
            case 0:
                for _ in range(chance.randint(1, 8)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
            case 1:
                for _ in range(chance.randint(1, 3)):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 2:
                del data[chance.randrange(len(data)) :]
            case 3:
                data = bytearray(chance.randbytes(chance.randrange(min(most, RANDOM_MAX))))
            case 4:
                data = bytearray(chance.choice((b"\x91", b"\x81", b"\xc7\x01\x50")) * chance.randrange(1, most // 3))
            case 5:
                place = chance.randrange(len(data))
                data[place:place] = chance.choice(LENGTHS)
            case 6:
                data += chance.randbytes(chance.randrange(1, min(most, 300)))
            case _:
                return self._of_wrong_types(message)
        return bytes(data)

    def _of_wrong_types(self, message: bytes) -> bytes:
        """One field of it replaced, left out, or given twice."""
        chance = self.chance
        try:
            content = msgspec.msgpack.decode(message)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return self.spoiled(b"")
        holders = list(_holders(content))
        if not holders:
            return msgspec.msgpack.encode(chance.choice(WRONG))
        holder = chance.choice(holders)
        place = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match chance.randrange(6):
            case 0:
                del holder[place]
            case 1 if isinstance(holder, list):
                holder.insert(place, holder[place])
            case _:
                holder[place] = chance.choice(WRONG)
        return msgspec.msgpack.encode(content)


def _holders(content: Any) -> Iterator[Any]:
    """All lists and maps in it that have anything in them."""
    if isinstance(content, list | dict) and content:
        yield content
        for inner in content.values() if isinstance(content, dict) else content:
            yield from _holders(inner)


def _decoded(kind: Any, data: bytes) -> Any:
    return decode_message(data, kind)


def _contribution(codec: Codec, data: bytes) -> Any:
    return wire.decode_contribution(data, codec, 0, codec.chunks)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Something that reads what others send.

    Attributes:
        make: returns malformed bytes.
        read: decodes them.
        refuses: what it may raise.
    """

    make: Callable[[], bytes]
    read: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...] = ()


class Decoders:
    """All of them, with real messages of a run of two to spoil."""

    def __init__(self, chance: random.Random) -> None:
        self._spoiler, self._chance = Spoiler(chance), chance
        self._me, self._other, self._token = (identity_from(chance) for _ in range(3))
        manifest = Manifest(
            name="malformed",
            nonce=chance.randbytes(16).hex(),
            model=ModelConfig(layers=1, heads=1, embedding=32, context=32),
        )
        self._signed = sign_manifest(manifest, self._me.key, format_peer_id(self._me.peer_id))
        self._manifest, self.run_id = open_manifest(self._signed)
        self._replica = Replica(self._manifest, self.run_id, torch.device("cpu"))
        self._peers_key = peers_key(self.run_id)
        self._snapshot, self._arrays = self._replica.snapshot(), self._replica.arrays()
        self._codec = self._replica.codec
        self._beginning = self._manifest.beginning(self.run_id)
        branch = Branch(self._beginning, self._codec)
        joins = (Join(self._other.peer_id, Row(1, 1000, 0)),)
        self._rounds = [branch.forge(self._me, solo=True, joins=joins), branch.forge(self._me), branch.forge(self._me)]
        self._encoded = branch.after((branch.beginning,))[1]
        self._state = branch.state
        access = Access("invite", self._me.peer_id, (self._me.peer_id,), (self._grant(),))
        self._guarded = msgspec.structs.replace(self._state, access=access)
        self.messages = self._real_messages()
        self.all = dict(self._listed())

    def spoil(self, message: bytes) -> bytes:
        """Return malformed bytes made of these."""
        return self._spoiler.spoiled(message)

    def _invited(self) -> Invitation:
        token = self._token
        issued = Pass(self.run_id, self._me.peer_id, token.peer_id, 2**33, 5, b"", False)
        return Invitation(issued, self._me.sign(pass_message(issued)), token.key.private_bytes_raw())

    def _grant(self) -> Grant:
        return self._invited().grant(self._other.peer_id)

    def _real_messages(self) -> dict[str, Any]:
        """One of each kind that there is."""
        run, tip, row, one = self.run_id, Tip(5, bytes(32), 5), Row(1, 1, 1), bytes(range(32))
        offer = SnapshotOffer(32, one, one, 2**20)
        statements = (self._grant(),)
        made = (
            tip,
            Hello(PROTOCOL_VERSION),
            Dial(4000),
            Dialled("127.0.0.1", "nobody answers"),
            SealsRequest(run, 3, one, 64),
            SealsHeader(one, 64, tip),
            Welcome(PROTOCOL_VERSION, run, self._signed, tip, ""),
            ContributionHeader(run, 5, one, 0, row, bytes(64), 32, one, tip),
            Answer("no"),
            Arrived("", 12_345),
            BlobHeader(1000, one),
            Follow(run, tip),
            News(tip, self._rounds[1].signed, False),
            Relay(run, tip, self._rounds[1].signed),
            RoundsRequest(run, (one, run)),
            offer,
            RoundsHeader(one, 3, tip, (offer,), one),
            JoinRequest(run, row),
            Amend(run, statements),
            SnapshotRequest(run, one, one, 0, 1, True),
            FileRequest(run, one, 0, 1, True),
            PiecesHeld(b"\x07"),
            AuditRequest(run, one),
            ProofHeader(run, one),
        )
        return {type(message).__name__: message for message in made}

    def _listed(self) -> Iterator[tuple[str, Decoder]]:
        kinds = {name: getattr(wire_messages, name) for name in self.messages}
        for name, message in self.messages.items():
            yield (
                name,
                Decoder(
                    self._of(msgspec.msgpack.encode(message)),
                    functools.partial(_decoded, kinds[name]),
                    (CallError,),
                ),
            )
        yield "open_manifest", Decoder(self._a_manifest, open_manifest, (ManifestError,))
        yield "open_seal", Decoder(self._a_seal, self._read_seal, (SealError,))
        yield "decode_sealed", Decoder(self._of(*self._encoded), self._read_sealed, (SealedRoundError,))
        for bits in (1, 2, 8, 32):
            codec = self._small_codec(bits)
            sent = wire.encode_contribution(self._coefficients(codec), codec)
            yield (
                f"decode_contribution of {bits} bits",
                Decoder(
                    self._of(sent),
                    functools.partial(_contribution, codec),
                    (WireError,),
                ),
            )
        codec = self._small_codec(2)
        proof = self._proof(codec)
        body = evidence.body_of(proof.reply)
        yield (
            "decode_reply",
            Decoder(self._of(body), lambda data: wire.decode_reply(data, codec, 0, codec.chunks, 2), (WireError,)),
        )
        yield (
            "open_proof",
            Decoder(
                self._of(evidence.encode_proof(proof)),
                lambda data: evidence.open_proof(data, self.run_id, codec, verify),
                (EvidenceError,),
            ),
        )
        yield "open_proof, attested", self._attested_proofs(codec, proof)
        yield "open_record", self._records()
        yield "validate", self._validated()
        yield "decode_header", self._token_files()
        yield "TextTokenizer", self._tokenizers()
        yield "snapshot_chain", Decoder(self._a_snapshot, self._read_snapshot, (TensorFileError, CallError, SealError))
        text = self._invited().text().encode()
        yield (
            "read_invitation",
            Decoder(self._of(text), lambda data: read_invitation(data.decode("latin1")), (UsageError,)),
        )

    def _of(self, *real: bytes) -> Callable[[], bytes]:
        return lambda: self.spoil(self._chance.choice(real))

    # ---- what is signed after it was spoiled ------------------------------------------------------------------

    def _a_manifest(self) -> bytes:
        signed = msgspec.msgpack.decode(self._signed, type=SignedManifest)
        if self._chance.random() < 0.3:
            return self.spoil(self._signed)
        body = self.spoil(signed.body)
        return msgspec.msgpack.encode(SignedManifest(body, self._me.key.sign(run_id(body))))

    def _a_seal(self) -> bytes:
        body = self.spoil(self._chance.choice(self._rounds).signed.body)
        return msgspec.msgpack.encode(SignedSeal(body, self._me.sign(chain.seal_id(body))))

    def _read_seal(self, data: bytes) -> None:
        identifier, seal = chain.open_seal(chain.decode_signed_seal(data), verify)
        chain.extend(self._state, identifier, seal, self._codec.chunks)

    def _read_sealed(self, data: bytes) -> None:
        check_continues(self._state, decode_sealed(data, verify), self._codec, verify)

    def _a_snapshot(self) -> bytes:
        """Of the right length for what it says of itself, with another state of the chain."""
        if self._chance.random() < 0.2:
            return self.spoil(self._snapshot)
        state = msgspec.msgpack.encode(self._chance.choice((self._state, self._guarded)))
        return pack_tensors(self.spoil(state), self._arrays)

    def _read_snapshot(self, data: bytes) -> None:
        """As a newcomer does before it has seen a seal that names the root."""
        state = self._replica.snapshot_chain(data)
        check_start(state, self._guarded if state.access.mode != "open" else self._beginning)
        chain.shape_of(state, self._codec.chunks)
        chain.coming_shape(state, self._codec.chunks)

    def _records(self) -> Decoder:
        key, me = self._peers_key, self._me
        body = msgspec.msgpack.encode(self._peer_record())

        def make() -> bytes:
            return signed_record(me, key, self.spoil(body), 2e9)

        def read(data: bytes) -> None:
            check_record(data, key_id_of(key), me.peer_id)
            open_record(data, key, me.peer_id, PeerRecord, now=1e9)

        return Decoder(make, read, (RecordError,))

    def _peer_record(self) -> PeerRecord:
        return PeerRecord(
            peer_id=self._me.peer_id,
            run_id=self.run_id,
            time=1e9,
            name="mallory",
            state="training",
            role="member",
            round=7,
            state_id=bytes(32),
            total=20,
            addresses=["/ip4/127.0.0.1/tcp/9"],
        )

    def record_to_store(self) -> tuple[bytes, bytes, bytes, float]:
        """Return key, subkey, value and expiry as a node is asked to store them."""
        expires, me, chance = time.time() + 20, self._me, self._chance
        value = signed_record(me, self._peers_key, msgspec.msgpack.encode(self._peer_record()), expires)
        return (
            key_id_of(self._peers_key) if chance.random() < 0.8 else chance.randbytes(20),
            self._or_spoiled(msgspec.msgpack.encode(subkey_of(me.peer_id))),
            self._or_spoiled(msgspec.msgpack.encode(value)),
            expires if chance.random() < 0.8 else chance.choice((0.0, -1.0, 1e300, float("nan"))),
        )

    def _validated(self) -> Decoder:
        validator = SignedRecordValidator()
        return Decoder(
            lambda: msgspec.msgpack.encode(self.record_to_store()),
            lambda data: validator.validate(DHTRecord(*msgspec.msgpack.decode(data))),
        )

    def _or_spoiled(self, data: bytes) -> bytes:
        return self.spoil(data) if self._chance.random() < 0.7 else data

    def _token_files(self) -> Decoder:
        header = Header(300, 1000, "0" * 64, 5000, 100, 20_000, 400, 7, masked=self._chance.random() < 0.5)
        return Decoder(self._of(header.encode()), lambda data: decode_header(data, header.length), (DataError,))

    def _tokenizers(self) -> Decoder:
        return Decoder(self._of(train_tokenizer(["some text to train on. "], 260).json), TextTokenizer, (DataError,))

    # ---- payloads ---------------------------------------------------------------------------------------------

    def _small_codec(self, bits: int) -> Codec:
        topk = (4, 33, 1, 8)
        return replace(self._codec, topk=topk, reply_topk=topk, value_bits=bits)

    def _coefficients(self, codec: Codec) -> Coefficients:
        rng = np.random.default_rng(self._chance.randrange(2**32))
        index = [np.sort(rng.choice(CHUNK_SIZE, count, replace=False)) for count in codec.topk]
        values = [rng.standard_normal(count).astype(np.float32) for count in codec.topk]
        if codec.value_bits != wire.FLOAT_BITS:
            values = [quantise(torch.from_numpy(value)[None], codec.value_bits)[0].numpy() for value in values]
        chunk = np.repeat(np.arange(codec.chunks), codec.topk)
        return Coefficients(0, codec.chunks, chunk, np.concatenate(index), np.concatenate(values))

    def _proof(self, codec: Codec) -> Proof:
        """Of a reply that is right, so that it convicts nobody; its reducer is the attacker."""
        key, members = Key(5, bytes(32)), tuple(sorted((self._me.peer_id, self._other.peer_id)))
        payload, row = wire.encode_contribution(self._coefficients(codec), codec), Row(4, 1000, 100)
        signers, group = {one.peer_id: one for one in (self._me, self._other)}, Group(members, (1, 1))
        contributions = [
            Contribution(
                number, row, payload, evidence.sign_contribution(signers[peer].sign, self.run_id, key, 0, row, payload)
            )
            for number, peer in enumerate(members)
        ]
        reply, bundle = evidence.reduce_and_attest(
            contributions,
            codec,
            0,
            codec.chunks,
            sign=self._me.sign,
            run_id=self.run_id,
            key=key,
            part=0,
            group=group,
        )
        return Proof(self._me.peer_id, key.round, key.base, 0, group, reply, bundle)

    def _attested_proofs(self, codec: Codec, proof: Proof) -> Decoder:
        """Proofs whose reply or bundle is malformed, but attested: all that a reducer can have others check."""
        key = Key(proof.round, proof.base)

        def make() -> bytes:
            body, bundle = evidence.body_of(proof.reply), proof.bundle
            messages, payloads = bundle.messages, bundle.payloads
            if self._chance.random() < 0.5:
                body = self.spoil(body)
            else:
                payloads = tuple(self.spoil(payload) for payload in payloads)
                digests = [hashlib.sha256(payload).digest() for payload in payloads]
                messages = tuple(
                    msgspec.structs.replace(message, payload=digest)
                    for message, digest in zip(messages, digests, strict=True)
                )
            reply = evidence.attest(self._me.sign, self.run_id, key, 0, proof.group, body, messages)
            spoiled = msgspec.structs.replace(proof, reply=reply, bundle=evidence.Bundle(messages, payloads))
            return evidence.encode_proof(spoiled)

        return Decoder(make, lambda data: evidence.open_proof(data, self.run_id, codec, verify), (EvidenceError,))


def signed_record(identity: Identity, key: str, body: bytes, expires: float) -> bytes:
    """Sign what nobody would encode."""
    said = msgspec.msgpack.encode((key_id_of(key), identity.peer_id, "peer", expires, body))
    signature = identity.sign(b"p2ptrain record 1\0" + said)
    return msgspec.msgpack.encode((1, "peer", expires, body, signature))


def feed(
    seed: int, messages: int, progress: Callable[[int], None] = lambda done: None
) -> tuple[Counter[str], list[str]]:
    """Feed every decoder by turns; return how many each has taken, and what it did that it must not."""
    decoders = Decoders(random.Random(seed))
    taken: Counter[str] = Counter()
    faults: list[str] = []
    names = list(decoders.all)
    for number in range(messages):
        name = names[number % len(names)]
        decoder = decoders.all[name]
        data = decoder.make()
        try:
            decoder.read(data)
            taken[name] += 1
        except decoder.refuses:
            pass
        except Exception as error:
            faults.append(f"{name} of {data[:60].hex()} ({len(data)} bytes): {error!r}")
        progress(number + 1)
    return taken, faults


def main() -> int:
    """Feed so many; say what was taken, and what went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began, grown = time.monotonic(), Growth()

    def progress(done: int) -> None:
        if done == min(WARM_MESSAGES, options.messages // 2):
            grown.begin()
        if done % NOTE_EVERY == 0:
            note(f"{done:,} messages, {done / (time.monotonic() - began):,.0f} a second, memory {grown.so_far():+.1%}")

    taken, faults = feed(options.seed, options.messages, progress)
    for fault in faults[:20]:
        note(fault)
    say(
        messages=options.messages,
        seed=options.seed,
        faults=len(faults),
        rss_growth=round(grown.so_far(), 3),
        taken=taken,
    )
    return 1 if faults else 0


class Growth:
    """How much more memory this process holds than at a moment once everything had been used."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss

    def begin(self) -> None:
        """Count from now on."""
        self._before = self._process.memory_info().rss

    def so_far(self) -> float:
        """Return the growth, as a share."""
        return float(self._process.memory_info().rss / self._before - 1)


if __name__ == "__main__":
    sys.exit(main())
