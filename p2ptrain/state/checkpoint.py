"""The checkpoint: the replica, and what is this peer's own beside it, in one file with a hash.

Own are the momentum, what was sent and is not settled, and the count of sequences read. A crash loses the momentum
gathered since the last checkpoint and nothing else: seals are in the journal, contributions in the own log.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from p2ptrain.chain import ChainState
from p2ptrain.errors import HomeError
from p2ptrain.state.files import atomic_write
from p2ptrain.state.own_log import Outcome
from p2ptrain.state.tensors import Arrays, Shapes, TensorFileError, pack_tensors, unpack_tensors

_HASH_BYTES = 32
NAME = "checkpoint"


class SentUnsettled(msgspec.Struct, frozen=True, array_like=True):
    """A contribution that no seal had settled when the checkpoint was made."""

    round: int
    base: bytes
    decays: int
    payload: bytes
    """As a contribution for all chunks."""


class CheckpointMeta(msgspec.Struct, frozen=True, array_like=True):
    """What a checkpoint holds beside tensors."""

    run_id: bytes
    chain: ChainState
    decays: int
    sequences_read: int
    pending: tuple[SentUnsettled, ...]
    outcomes: tuple[Outcome, ...] = ()
    """Those since the last entry of the own log; the momentum has them already."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Meta and tensors."""

    meta: CheckpointMeta
    arrays: Arrays


_decoder = msgspec.msgpack.Decoder(CheckpointMeta)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `folder`."""
    body = pack_tensors(msgspec.msgpack.encode(checkpoint.meta), checkpoint.arrays)
    atomic_write(folder / NAME, hashlib.sha256(body).digest() + body, durable=True)


def load_checkpoint(folder: Path, shapes: Shapes) -> Checkpoint | None:
    """The checkpoint in `folder`, or None when there is none.

    Raises:
        HomeError: damaged, or of another model.
    """
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        if hashlib.sha256(data[_HASH_BYTES:]).digest() != data[:_HASH_BYTES]:
            raise TensorFileError("damaged")
        meta, arrays = unpack_tensors(data[_HASH_BYTES:], shapes)
        return Checkpoint(_decoder.decode(meta), arrays)
    except (TensorFileError, msgspec.MsgspecError) as error:
        raise HomeError(f"{path} cannot be used: {error}", hint=f"set it aside: mv {path} {path}.old") from error
