"""The identity file is what libp2p reads, and the peer id alone checks a signature."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.errors import HomeError
from p2ptrain.swarm.identity import (
    format_peer_id,
    load_or_create_identity,
    new_identity,
    parse_peer_id,
    verify,
)


def test_the_file_is_libp2ps_protobuf_and_survives_a_reload(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    identity = load_or_create_identity(path)
    message = crypto_pb2.PrivateKey.FromString(path.read_bytes())
    public = identity.key.public_key().public_bytes_raw()
    assert message.key_type == 1
    assert message.data == identity.key.private_bytes_raw() + public
    assert identity.peer_id == b"\x00\x24" + crypto_pb2.PublicKey(key_type=1, data=public).SerializeToString()
    assert load_or_create_identity(path).peer_id == identity.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["identity.key"]


def test_peer_ids_read_as_in_libp2p() -> None:
    peer_id = new_identity().peer_id
    assert format_peer_id(peer_id) == PeerID(peer_id).to_base58()
    assert parse_peer_id(format_peer_id(peer_id)) == peer_id
    with pytest.raises(ValueError, match="not an Ed25519"):
        parse_peer_id("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")


@pytest.mark.parametrize("content", [b"", b"x" * 68, b"\x08\x01\x12\x40" + b"\x01" * 64])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(HomeError, match=r"identity\.key"):
        load_or_create_identity(path)


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="cannot read or write"):
        load_or_create_identity(tmp_path / "missing" / "identity.key")


@given(data=st.binary(max_size=64), other=st.binary(max_size=64))
def test_a_signature_holds_for_its_data_and_signer_only(data: bytes, other: bytes) -> None:
    one, two = new_identity(), new_identity()
    signature = one.sign(data)
    assert verify(one.peer_id, data, signature)
    assert not verify(two.peer_id, data, signature)
    assert verify(one.peer_id, other, signature) == (other == data)


def test_a_signature_means_nothing_outside_p2ptrain() -> None:
    identity = new_identity()
    public = Ed25519PublicKey.from_public_bytes(identity.peer_id[6:])
    with pytest.raises(InvalidSignature):
        public.verify(identity.sign(b"noise-libp2p-static-key:"), b"noise-libp2p-static-key:")


@given(peer_id=st.binary(max_size=48), signature=st.binary(max_size=72))
def test_any_bytes_can_be_checked(peer_id: bytes, signature: bytes) -> None:
    assert not verify(peer_id, b"data", signature)
