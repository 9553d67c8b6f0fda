"""Does this device compute the bits that the run requires? Asked once, before a peer trains.

Between the bytes of a reply and the parameters lie the exact decode, a direction and the learning rate. All of them
run here over made-up integers, and a hash of what comes out is compared with one shipped in the code. A device that
rounds otherwise (TF32 forced on, subnormals flushed to zero, a faulty kernel) fails here instead of diverging later.

Cost: a few milliseconds; six chunks.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import torch
from torch import Tensor

from p2ptrain.compression import coding, dct
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, ChunkLayout, Kind, ParameterSpec, Transform, Treatment
from p2ptrain.errors import DivergenceError
from p2ptrain.models.init import unit_normal_integers
from p2ptrain.optim.directions import Adam, Muon, Nesterov, Rms, Sign
from p2ptrain.optim.schedule import learning_rate

EXPECTED = "2ca668329e7fcb7dee1f44f506f8446082134e6964993c84b346af1eaeaf965e"
"""What `self_test` returns on a device that computes right."""

_SHAPES: tuple[tuple[Kind, Transform, tuple[int, ...]], ...] = (
    ("matrix", "dct", (SIDE, 3 * SIDE)),
    ("vector", "dct", (CHUNK_SIZE + 1,)),
    ("embedding", "none", (SIDE, SIDE)),
)
_RATED_ROUNDS = (0, 1, 99, 100, 101, 2500, 5000, 9999, 10_000, 20_000)


def _layout() -> ChunkLayout:
    treatments: dict[str, Treatment] = {
        kind: Treatment(transform=transform, direction="sign", learning_rate_scale=1.0, topk=1, reply_topk=1)
        for kind, transform, _ in _SHAPES
    }
    return ChunkLayout([ParameterSpec(kind, shape, kind) for kind, _, shape in _SHAPES], treatments)


def _values(chunks: int) -> np.ndarray:
    """Integers [chunks, 64 * 64] as replies hold them: dense ones, as large as any, and few among zeros."""
    integers = unit_normal_integers(b"p2ptrain self-test", chunks * CHUNK_SIZE).reshape(chunks, CHUNK_SIZE)
    values = integers // 1028  # from -128 to 127
    values[1] = np.where(integers[1] < 0, -dct.VALUE_MAX, dct.VALUE_MAX)
    values[2][integers[2] % 32 != 0] = 0
    return values.astype(np.float32)


def _bytes(tensor: Tensor) -> bytes:
    # A sum of products that are all zero may have either sign of zero, and no step depends on it: both become +0.
    return (tensor.cpu().numpy() + np.float32(0)).astype("<f4").tobytes()


def self_test(device: torch.device) -> str:
    """SHA-256 in hexadecimal of what `device` makes of fixed integers: decode, steps, rates."""
    layout = _layout()
    integers, unit = dct.decode_exact(layout, torch.from_numpy(_values(layout.chunks)).to(device))
    digest = hashlib.sha256(_bytes(integers) + _bytes(unit))
    codes = np.arange(1, 1 + 40 * layout.chunks, 40)
    scale = torch.from_numpy(coding.scale_table()[codes]).to(device)
    update = integers * (unit * scale).unsqueeze(1)
    live = torch.ones(layout.chunks, dtype=torch.bool, device=device)
    for segment in layout.segments:
        piece = slice(segment.start, segment.end)
        digest.update(_bytes(Sign(layout, segment, 0.95, 1e-8, device).step(update[piece], live[piece])))
        rms = Rms(layout, segment, 0.95, 1e-8, device)
        # An entry that has long been still has a second moment below the smallest normal float32, 2**-126.
        moment = torch.full_like(update[piece], 1.25 * 2.0**-127)
        rms.load_state({"second": moment, "second_decayed": torch.full_like(moment[:, :1], 0.5)})
        digest.update(_bytes(rms.step(update[piece], live[piece])))
        digest.update(b"".join(_bytes(tensor) for tensor in rms.state().values()))
        for kind in (Nesterov, Adam, *(() if segment.is_vector else (Muon,))):
            direction = kind(layout, segment, 0.95, 1e-8, device)
            for _ in range(2):
                digest.update(_bytes(direction.step(update[piece], live[piece])))
    rates = [
        learning_rate(number, peak=0.02, warmup_rounds=100, total_rounds=10_000, final_fraction=0.1)
        for number in _RATED_ROUNDS
    ]
    digest.update(struct.pack(f"<{len(rates)}d", *rates))
    return digest.hexdigest()


def check(device: torch.device) -> None:
    """Make sure that a replica on `device` holds the same bits as every other.

    Raises:
        DivergenceError: it would not.
    """
    if self_test(device) != EXPECTED:
        raise DivergenceError(
            f"this machine's device ({device}) does not compute the bits the run requires",
            hint=f"join with --device cpu, or file a report that names torch {torch.__version__}",
        )
