"""The manifest: one canonical form, one hash, one owner, and no value that would break who reads it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.config.loading import parse_manifest, render
from p2ptrain.config.manifest import (
    MANIFEST_MAX_BYTES,
    TOKENIZER_VOCABULARY,
    AccessConfig,
    DataConfig,
    EvaluationConfig,
    FileConfig,
    Manifest,
    ModelConfig,
    OptimizerConfig,
    RoundConfig,
    SignedManifest,
    SourceConfig,
    TaskConfig,
    canonical_bytes,
    open_manifest,
    run_id,
    sign_manifest,
)
from p2ptrain.data.tokenizer import load_tokenizer
from p2ptrain.errors import ManifestError
from p2ptrain.models.gpt import GPT
from p2ptrain.swarm.identity import format_peer_id, new_identity

NONCE = "0123456789abcdef" * 2
PEER = "12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5"
VALUES = FileConfig(bytes=64, root="ab" * 32)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def small() -> Manifest:
    return Manifest(name="small", nonce=NONCE)


def signed(body: bytes, key: Ed25519PrivateKey = KEY) -> bytes:
    """A manifest as a stranger may make it: any body, well signed."""
    return msgspec.msgpack.encode(SignedManifest(body, key.sign(run_id(body))))


def as_sent(**changes: object) -> bytes:
    """A well-signed manifest in which top-level fields are replaced without any check."""
    table = msgspec.to_builtins(small()) | {"owner": KEY.public_key().public_bytes_raw().hex()} | changes
    return signed(msgspec.msgpack.encode(table))


def tables(kind: type[msgspec.Struct], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(path, type) of every key of a manifest."""
    for field in msgspec.structs.fields(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from tables(field.type, (*path, field.name))
        else:
            yield (*path, field.name), field.type


def test_what_is_signed_opens_as_it_was_with_owner_and_founder_filled_in() -> None:
    manifest, identifier = open_manifest(sign_manifest(small(), KEY, PEER))
    owner = KEY.public_key().public_bytes_raw().hex()
    assert manifest == msgspec.structs.replace(small(), owner=owner, founder=PEER)
    assert format_peer_id(manifest.founder_id) == PEER and small().founder_id == b""
    assert identifier == hashlib.sha256(b"p2ptrain manifest 1\0" + canonical_bytes(manifest)).digest()


def test_every_key_is_part_of_the_hash() -> None:
    task = TaskConfig(parameters=7, values=VALUES)
    source = SourceConfig(name="letters", license="MIT")
    data = DataConfig(tokens=FileConfig(bytes=9, root="0" * 64), sources=(source,))
    more = {"task": task, "data": data, "evaluation": EvaluationConfig()}
    whole = msgspec.structs.replace(small(), founder=PEER, round=RoundConfig(robust="mean"), **more)
    body = msgspec.msgpack.decode(canonical_bytes(whole))
    for path, _ in tables(Manifest):
        inner = body
        for name in path:
            assert name in inner, path
            inner = inner[name]


@given(st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    encoded = bytearray(sign_manifest(small(), KEY, PEER))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ManifestError):
        open_manifest(bytes(encoded))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_with_the_one_error(garbage: bytes) -> None:
    for encoded in (garbage, signed(garbage)):
        with pytest.raises(ManifestError):
            open_manifest(encoded)


@pytest.mark.parametrize("nested", [b"\x91", b"\x81", b"\x81\xa1q\x91"])
def test_deep_nesting_is_refused(nested: bytes) -> None:
    body = nested * (MANIFEST_MAX_BYTES // 5)
    for encoded in (body, signed(body)):
        with pytest.raises(ManifestError):
            open_manifest(encoded)


def test_another_runs_manifest_is_refused() -> None:
    encoded = sign_manifest(small(), KEY, PEER)
    _, identifier = open_manifest(encoded)
    open_manifest(encoded, identifier)
    with pytest.raises(ManifestError, match="hashes to"):
        open_manifest(encoded, bytes(32))


def test_a_manifest_signed_by_another_than_its_owner_is_refused() -> None:
    body = canonical_bytes(msgspec.structs.replace(small(), owner=KEY.public_key().public_bytes_raw().hex()))
    with pytest.raises(ManifestError, match="not signed by the owner"):
        open_manifest(signed(body, Ed25519PrivateKey.generate()))


def test_a_manifest_without_owner_is_refused() -> None:
    with pytest.raises(ManifestError, match="not signed by the owner"):
        open_manifest(signed(canonical_bytes(small())))


def test_another_order_of_the_same_fields_is_refused() -> None:
    table = msgspec.msgpack.decode(canonical_bytes(small()))
    body = msgspec.msgpack.encode(dict(reversed(table.items())))
    with pytest.raises(ManifestError, match="canonical") as raised:
        open_manifest(signed(body))
    assert "install the version" in str(raised.value.hint)


def test_another_protocol_is_named_even_if_its_fields_are_unknown() -> None:
    with pytest.raises(ManifestError, match="protocol 999") as caught:
        open_manifest(as_sent(protocol=999, invented_later=True))
    assert "version" in caught.value.hint


def test_a_manifest_too_large_for_peers_is_refused_before_it_is_read_and_before_it_is_sent() -> None:
    with pytest.raises(ManifestError, match="at most"):
        open_manifest(bytes(MANIFEST_MAX_BYTES + 1))
    full = msgspec.structs.replace(small(), access=AccessConfig(mode="list", peers=(PEER,) * 150))
    open_manifest(sign_manifest(full, KEY, PEER))
    with pytest.raises(ManifestError) as caught:
        sign_manifest(msgspec.structs.replace(full, access=AccessConfig(mode="list", peers=(PEER,) * 400)), KEY, PEER)
    assert "access.peers" in caught.value.hint


def test_no_number_of_a_manifest_may_be_nan_or_infinite_or_huge() -> None:
    body = msgspec.to_builtins(small())
    floats = 0
    for path, kind in tables(Manifest):
        *folders, last = path
        if getattr(kind, "__origin__", kind) not in (int, float):
            continue
        for value in (math.nan, math.inf, -math.inf) if getattr(kind, "__origin__", kind) is float else (-1, 2**63):
            changed = msgspec.msgpack.decode(msgspec.msgpack.encode(body))
            inner = changed
            for name in folders:
                inner = inner[name]
            inner[last] = value
            with pytest.raises(msgspec.ValidationError, match=last):
                msgspec.convert(changed, Manifest)
            floats += 1
    assert floats > 60


@pytest.mark.parametrize("text", ["run\n", "\x1b[2J", "", " run", "r" * 65])
def test_names_cannot_disturb_a_terminal(text: str) -> None:
    with pytest.raises(ManifestError):
        open_manifest(as_sent(name=text))
    data = msgspec.to_builtins(small().data)
    for key in ("name", "license", "sha256"):
        with pytest.raises(ManifestError):
            open_manifest(as_sent(data=data | {key: text + "\x07"}))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"layers": 1, "heads": 2, "embedding": 32, "context": 16},
        {"layers": 3, "heads": 3, "embedding": 96, "context": 8, "mlp_ratio": 3},
    ],
)
def test_the_number_of_parameters_is_that_of_the_model_built(sizes: dict[str, int]) -> None:
    config = ModelConfig(**sizes)
    assert config.parameters == sum(p.numel() for p in GPT(config).parameters())


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embedding = 130 must be a multiple of 2 \* heads = 8"):
        ModelConfig(embedding=130)
    with pytest.raises(ValueError, match="at most 2,147,483,648"):
        ModelConfig(layers=256, embedding=32_768)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    assert load_tokenizer().get_vocab_size() == TOKENIZER_VOCABULARY
    with pytest.raises(ValueError, match="vocabulary = 4095"):
        Manifest(name="small", nonce=NONCE, model=ModelConfig(vocabulary=TOKENIZER_VOCABULARY - 1))


def test_a_direction_for_matrices_is_refused_for_vectors() -> None:
    group = msgspec.structs.replace(OptimizerConfig().vector, direction="muon")
    with pytest.raises(ValueError, match="muon"):
        OptimizerConfig(vector=group)


def test_a_list_of_peers_and_the_mode_must_agree() -> None:
    for mode in ("list", "invite"):
        # The owner may add some later.
        for peers in ((PEER,), ()):
            AccessConfig(mode=mode, peers=peers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contradicts"):
        AccessConfig(mode="open", peers=(PEER,))


def test_a_run_with_a_list_admits_its_founder_and_the_peers_listed_and_no_other() -> None:
    founder, listed, other = (new_identity().peer_id for _ in range(3))
    for mode in ("list", "invite"):
        access = AccessConfig(mode=mode, peers=(format_peer_id(listed),))  # type: ignore[arg-type]
        closed = msgspec.structs.replace(small(), access=access, founder=format_peer_id(founder))
        admits = closed.beginning(bytes(32)).access.admits
        assert [admits(peer) for peer in (founder, listed, other)] == [True, True, False]
    assert small().beginning(bytes(32)).access.admits(other)


def test_what_records_are_encrypted_with_follows_from_the_whole_manifest_and_not_from_the_run_id() -> None:
    closed = msgspec.structs.replace(small(), access=AccessConfig(mode="list", peers=(PEER,)))
    other = msgspec.structs.replace(closed, nonce=NONCE[::-1])
    assert small().records_key == b""
    assert len({closed.records_key, other.records_key, run_id(canonical_bytes(closed))}) == 3
    assert len(closed.records_key) == 32


def test_a_manifest_that_does_not_say_how_sums_are_made_is_encoded_as_before_there_was_the_key() -> None:
    body = canonical_bytes(small())
    plain = msgspec.msgpack.decode(body)
    assert "robust" not in plain["round"]
    assert msgspec.msgpack.encode(plain) == body
    chosen = canonical_bytes(msgspec.structs.replace(small(), round=RoundConfig(robust="centered_clip")))
    assert msgspec.msgpack.decode(chosen)["round"]["robust"] == "centered_clip"


def test_a_manifest_of_the_built_in_model_is_encoded_as_before_there_were_others() -> None:
    body = canonical_bytes(small())
    plain = msgspec.msgpack.decode(body)
    assert "task" not in plain and small().own_model is None
    assert msgspec.msgpack.encode(plain) == body
    other = msgspec.structs.replace(small(), task=TaskConfig(parameters=7, values=VALUES))
    opened, _ = open_manifest(sign_manifest(other, KEY, PEER))
    assert opened.own_model == other.task and opened.parameters == 7
    values = ({"bytes": 0}, {"bytes": 2**38 + 1}, {"root": "AB" * 32}, {"root": ""}, {"root": "ab" * 32 + "\n"})
    files = [{"values": msgspec.to_builtins(VALUES) | wrong} for wrong in values]
    for wrong in ({"parameters": 0}, {"parameters": 2**40}, {"kind": "pickle"}, *files):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(msgspec.to_builtins(other.task) | wrong, TaskConfig)


ARCHITECTURE = '{"model_type":"llama","vocab_size":4096}'


@pytest.mark.parametrize(
    ("task", "more", "why"),
    [
        ({"kind": "gpt", "context": 64}, {}, "context is for kind hf"),
        ({"kind": "code", "config": ARCHITECTURE}, {}, "config is for kind hf"),
        ({"kind": "hf", "context": 64}, {}, "needs config and context"),
        ({"kind": "hf", "context": 64, "config": '{"vocab_size": 4096}'}, {}, "without spaces"),
        ({"kind": "hf", "context": 64, "config": "[" * 4000}, {}, "."),
        ({"kind": "hf", "context": 64, "config": '{"x":NaN,"vocab_size":4096}'}, {}, "NaN"),
        ({"kind": "hf", "context": 64, "config": '{"vocab_size":1.5}'}, {}, "vocab_size"),
        ({"kind": "hf", "context": 64, "config": '{"vocab_size":300}'}, {}, "is below the tokenizer's 4096"),
        ({"kind": "hf", "context": 64, "config": " " * 9000}, {}, "length"),
        ({"kind": "hf", "context": 64, "config": ARCHITECTURE}, {"model": {"layers": 3}}, "leave it out"),
        ({"kind": "gpt"}, {}, "and model makes"),
    ],
    ids=str,
)
def test_a_task_that_contradicts_itself_is_refused(task: dict[str, object], more: dict[str, object], why: str) -> None:
    values = msgspec.to_builtins(VALUES)
    with pytest.raises(ManifestError, match=why):
        open_manifest(as_sent(task={"parameters": 1, "values": values} | task, **more))


def test_an_architecture_says_how_long_sequences_are_and_how_many_tokens_there_may_be() -> None:
    task = TaskConfig(kind="hf", parameters=1, values=VALUES, context=64, config=ARCHITECTURE)
    manifest = Manifest(name="small", nonce=NONCE, task=task)
    assert (manifest.context, manifest.vocabulary, manifest.own_model) == (64, 4096, None)
    assert f"config = '{ARCHITECTURE}'" in render(manifest)
    assert parse_manifest(render(manifest), Path("run.toml")) == manifest
    assert (small().context, small().vocabulary) == (small().model.context, small().model.vocabulary)
