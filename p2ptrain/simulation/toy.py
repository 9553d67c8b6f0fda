"""The toy that a simulated swarm trains: vectors of eight entries with small integers for gradients, and their sums.

Small enough that every coefficient can be accounted for to the last unit.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from p2ptrain.compression.codec import Codec
from p2ptrain.config.manifest import Manifest
from p2ptrain.models.init import initialise
from p2ptrain.swarm.identity import Identity
from p2ptrain.training.replica import build_optimizer

Rows = NDArray[np.float64]
ENTRIES = 8
"""In each vector of the toy; each vector is one chunk."""


class ViolationError(AssertionError):
    """An invariant does not hold."""


class PeerCrashed(BaseException):
    """Raised at the place where a peer dies; nothing of it runs afterwards."""


def identity_of(name: str, seed: int) -> Identity:
    """The same for the same name and seed."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest())
    return Identity(bytes.fromhex("002408011220") + key.public_key().public_bytes_raw(), key)


class ToyModel(torch.nn.Module):
    """As many vectors as there are chunks."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.vectors = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(ENTRIES)) for _ in range(chunks)])


def dense(
    chunk: NDArray[np.int64], index: NDArray[np.int64], value: NDArray[np.float32], chunks: int
) -> NDArray[np.float64]:
    """Coefficients as [chunks, ENTRIES]; what lies in the padding must be zero."""
    inside = index < ENTRIES
    if value[~inside].any():
        raise AssertionError("a coefficient of the padding is not zero")
    rows = np.zeros((chunks, ENTRIES))
    rows[chunk[inside], index[inside]] = value[inside]
    return rows


def toy_beginning(manifest: Manifest, chunks: int) -> tuple[Codec, NDArray[np.float32]]:
    """Return the toy's codec and its first parameters [chunks, ENTRIES]."""
    model: Any = ToyModel(chunks)
    initialise(model, bytes.fromhex(manifest.nonce))
    codec = build_optimizer(model, manifest).codec
    with torch.no_grad():
        return codec, np.stack([parameter.numpy().copy() for parameter in model.parameters()])
