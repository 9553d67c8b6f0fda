"""What a peer does before its first round: compile all that a round needs, and see that it computes the run's bits.

Compiled (`native/compiled.py`) is by taking part in a round of a toy, so that no round of a run waits. Then the real
optimizer, on the peer's own device, takes some steps of another toy: every direction with every transform, parameters
of whole chunks, with edges and vectors, weight decay, parts that are skipped. From the run's nonce to the bytes of a
snapshot all that replicas must agree on lies between: initial parameters, learning rates, replies as bytes and
decoded, the decode, directions, steps. A hash of it is compared with one shipped in the code. A device that rounds
otherwise (TF32 forced on, subnormals flushed to zero, a faulty kernel) fails here instead of diverging later. In the
hash are replies reduced from fixed contributions, too, by every way to sum: a machine whose sums are not everybody's
would be taken for a lying reducer (`chain/evidence.py`).

Hashed are the bytes of parameters and of the directions' state as they are, zeros with their signs: that is what the
root of a snapshot hashes. Neither holds a -0.0 on any device: they begin without one, and a sum or difference is one
only where both its terms are zeros. Steps may be one, so they are not hashed.

Cost: a start where nothing is compiled yet compiles everything, once a version; `docs/quickstart.md` says how long that
takes. Every later start loads what was compiled; the steps are a tenth of what remains.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from p2ptrain.compression import coding, decoded, wire
from p2ptrain.compression.codec import Codec, Robust
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.errors import DivergenceError
from p2ptrain.models.init import initialise, unit_normal_integers
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.directions import DIRECTIONS
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.optim.settling import PartReply
from p2ptrain.state.snapshot import piece_hashes, root_of
from p2ptrain.state.tensors import pack_tensors

EXPECTED = "c75ba68ec644a2bf18cc54aeabc7c3fd79f97fe999091ac54ccc0b61c624b9c2"
"""What `self_test` returns on a device that computes right."""

_logger = logging.getLogger(__name__)
_SAY_AFTER_SECONDS = 3.0
_MEMBERS, _VALUE_BITS, _TOPK = 2, 2, 4
_RATED_ROUNDS = (0, 1, 99, 100, 101, 2500, 5000, 9999, 10_000, 20_000)
_NONCE = b"p2ptrain self-test"
_SHAPES = {"whole": (2 * SIDE, SIDE), "wide": (SIDE, 2 * SIDE), "edges": (SIDE + 6, SIDE + 1), "gain": (SIDE + 6,)}
"""A matrix of whole chunks below each other and side by side, one with edges, a vector."""
_STEPS, _PARTS = 3, 5
_SUMMED = 6
"""Members whose contributions are reduced; enough for one at each end to be trimmed."""
_SMALL = 1.25 * 2.0**-127
"""An entry that has long been still has a second moment below the smallest normal float32, 2**-126."""


def make_ready(device: torch.device) -> None:
    """Compile what a round needs, saying so where it takes more than a few seconds, and `check` the bits.

    Raises:
        DivergenceError: this device does not compute the run's.
    """
    began = time.monotonic()
    say = threading.Timer(_SAY_AFTER_SECONDS, _logger.info, ["compiling the codec, once on a machine"])
    say.daemon = True
    say.start()
    try:
        _take_part(_member(device))
        check(device)
    finally:
        say.cancel()
        say.join()
    _logger.debug("codec warm and its bits checked after %.1f s", time.monotonic() - began)


# ---- compiling ------------------------------------------------------------------------------------------------------


def _member(device: torch.device) -> DeMo:
    """A chunk of each form, and of one that steps by other than signs."""
    forms = (
        {"params": [torch.zeros(SIDE, SIDE, device=device, requires_grad=True)]},
        {"params": [torch.zeros(SIDE, SIDE, device=device, requires_grad=True)], "direction": "muon"},
        {"params": [torch.zeros(SIDE, device=device, requires_grad=True)]},
        {
            "params": [torch.zeros(SIDE, SIDE, device=device, requires_grad=True)],
            "transform": "none",
            "direction": "rms",
        },
    )
    for form in forms:
        for parameter in form["params"]:
            assert isinstance(parameter, torch.Tensor)
            entries = torch.arange(parameter.numel(), dtype=torch.float32, device=device)
            parameter.grad = entries.view(parameter.shape)
    return DeMo(forms, topk=_TOPK, reply_topk=_TOPK, value_bits=_VALUE_BITS)


def _take_part(optimizer: DeMo) -> None:
    """As a reducer of what it sent itself, of that with what another sent, and as one who reads what others reduced."""
    codec, chunks = optimizer.codec, optimizer.codec.chunks
    pending = optimizer.accumulate_and_select()
    (payload,) = optimizer.payloads(pending, [(0, chunks)])
    wire.decode_contribution(payload, codec, 0, chunks)
    reduced = [
        reduce_part([(member, 1, payload) for member in range(senders)], codec, 0, chunks, _MEMBERS)
        for senders in range(1, _MEMBERS + 1)
    ]
    for robust in get_args(Robust):
        # As many as it takes for one to be trimmed.
        reduce_part([(member, 1, payload) for member in range(4)], replace(codec, robust=robust), 0, chunks, 4)
    for content in (
        wire.decode_reply(reduced[0], codec, 0, chunks, _MEMBERS),
        decoded.reply(reduced[1], codec, 0, chunks, _MEMBERS),
    ):
        optimizer.apply([(0, chunks, content)])
        optimizer.unsettle(optimizer.settle(pending, [(0, chunks, content)], 0))
    optimizer.step()


# ---- bits -----------------------------------------------------------------------------------------------------------


class _Toy(nn.Module):
    """Parameters of all shapes for each direction and transform; `embedding` and `head` begin as a model's do."""

    def __init__(self) -> None:
        super().__init__()
        #: submodule, direction, transform
        self.forms = [("embedding", "rms", "none"), ("head", "sign", "dct")]
        self.forms += [
            (f"{direction}_{transform}", direction, transform)
            for direction in DIRECTIONS
            for transform in ("dct", "none")
            if (direction, transform) not in {form[1:] for form in self.forms}
        ]
        for name, direction, _ in self.forms:
            of = nn.Module()
            for shape_name, shape in _SHAPES.items():
                if direction != "muon" or len(shape) > 1:
                    of.register_parameter(shape_name, nn.Parameter(torch.empty(shape)))
            if name == "head":
                of.register_parameter("weight", nn.Parameter(torch.empty(SIDE, SIDE)))
            self.add_module(name, of)

    def optimizer(self) -> DeMo:
        """Groups of different rates and decays; of every third, none.

        Steps are as large as parameters or larger: of smaller ones the last bits would be lost in the difference.
        """
        groups = [
            {
                "params": list(self.get_submodule(name).parameters()),
                "transform": transform,
                "direction": direction,
                "learning_rate_scale": 512 + 64 * number,
                "weight_decay": number % 3 / 4096,
            }
            for number, (name, direction, transform) in enumerate(self.forms)
        ]
        return DeMo(groups, topk=_TOPK, reply_topk=CHUNK_SIZE)


def _reply(made_up: NDArray[np.int64], codec: Codec, step: int, start: int, end: int, members: int) -> bytes:
    """A reply of `made_up` integers [rows, 64 * 64]: full chunks of the largest values, sparse ones, of scale 0."""
    counts, index, byte, codes = [], [], [], []
    for chunk in range(start, end):
        integers = made_up[(chunk + 5 * step) % len(made_up)]
        few = (3 * chunk + 5 * step) % 7
        taken = np.flatnonzero(integers % (1 << 2 * few) == 0)
        taken = taken if len(taken) else np.array([chunk])
        size = np.full(len(taken), 128) if few == 0 else np.abs(integers[taken]) % 128 + 1
        counts.append(len(taken))
        index.append(taken)
        byte.append(np.where(integers[taken] < 0, -size, size))
        codes.append((31 * chunk + 97 * step) % 256 if few > 1 else 150 + chunk % 50)
    kept = wire.Kept(np.array(counts), np.concatenate(index), np.concatenate(byte), np.array(codes, np.uint8))
    return wire.encode_reply(kept, codec, start, members, frozenset({0, members - 1}), {members - 1: 100 + step})


def _replies(step: int, codec: Codec) -> list[tuple[int, int, bytes | None]]:
    """For the parts of a step; from the second step on one is skipped, in which parameters begin or end."""
    made_up = unit_normal_integers(_NONCE, 11 * CHUNK_SIZE).reshape(-1, CHUNK_SIZE)
    edges = [part * codec.chunks // _PARTS for part in range(_PARTS + 1)]
    skipped = 2 * step if step else None
    return [
        (start, end, None if part == skipped else _reply(made_up, codec, step, start, end, _MEMBERS + step))
        for part, (start, end) in enumerate(itertools.pairwise(edges))
    ]


def _sums() -> list[bytes]:
    """Replies to what made-up members sent for chunks of four coefficients, of sizes that are clipped and weights that
    are capped, by every way to sum."""
    chunks, members = 3, _SUMMED
    made_up = unit_normal_integers(_NONCE, 2 * members * chunks * _TOPK).reshape(2, members, chunks, _TOPK)
    codec = Codec((_TOPK,) * chunks, (2 * _TOPK,) * chunks, _VALUE_BITS, clip_ratio=1.25, weight_cap_ratio=1.5)
    low, high = coding.LEVELS_2BIT
    contributions = []
    for member in range(members):
        # Few places, so that members collide.
        index = np.sort(made_up[0, member] % 8 + 8 * np.arange(_TOPK), axis=1)
        sizes = coding.scale_table()[100 + 7 * member + np.arange(chunks)][:, None]
        levels = np.where(made_up[1, member] & 1, sizes * high, sizes * low)
        # One of each level, as a chunk's scale follows from both.
        levels[:, :2] = np.concatenate([sizes * low, sizes * high], axis=1)
        value = np.where(made_up[1, member] & 2, -levels, levels).astype(np.float32)
        chunk = np.repeat(np.arange(chunks), _TOPK)
        sent = wire.Coefficients(0, chunks, chunk, index.ravel(), value.ravel())
        contributions.append((member, 3 + 5 * member, wire.encode_contribution(sent, codec)))
    ways = (replace(codec, robust=robust) for robust in get_args(Robust))
    return [reduce_part(contributions, way, 0, chunks, members) for way in ways]


def _content_hash(content: wire.ReplyContent) -> bytes:
    of = content.coefficients
    digest = hashlib.sha256(repr((sorted(content.included), sorted(content.clips.items()), of.start, of.end)).encode())
    for array, form in ((of.chunk, "<i8"), (of.index, "<i8"), (of.value, "<f4"), (content.byte, "<i8")):
        digest.update(array.astype(form).tobytes())
    digest.update(content.scale.astype("<f4").tobytes())
    return digest.digest()


def _root(model: nn.Module, optimizer: DeMo) -> bytes:
    """As of a snapshot."""
    tensors = dict(model.named_parameters()) | optimizer.replicated_state()
    data = pack_tensors(_NONCE, {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()})
    return root_of(len(data), piece_hashes(data))


def _rates(rounds: Sequence[int]) -> list[float]:
    return [
        learning_rate(number, peak=0.02, warmup_rounds=100, total_rounds=10_000, final_fraction=0.1)
        for number in rounds
    ]


def self_test(device: torch.device) -> str:
    """SHA-256 in hexadecimal of what `device` makes of fixed integers; see the module docstring."""
    rates = _rates(_RATED_ROUNDS)
    digest = hashlib.sha256(struct.pack(f"<{len(rates)}d", *rates))
    for reply in _sums():
        digest.update(hashlib.sha256(reply).digest())
    model = _Toy()
    initialise(model, _NONCE)
    model.to(device)
    optimizer = model.optimizer()
    state = optimizer.replicated_state()
    begun = {"first": 2.0**-10, "second": _SMALL, "first_decayed": 0.5, "second_decayed": 0.5}
    optimizer.load_replicated_state({n: torch.full_like(t, begun[n.split(".")[1]]) for n, t in state.items()})
    digest.update(_root(model, optimizer))
    for step in range(_STEPS):
        replies: list[PartReply] = []
        for start, end, data in _replies(step, optimizer.codec):
            content = None
            if data is not None:
                content = wire.decode_reply(data, optimizer.codec, start, end, _MEMBERS + step)
                digest.update(hashlib.sha256(data).digest() + _content_hash(content))
            replies.append((start, end, content))
        optimizer.apply(replies, rates[3 * step])
        digest.update(_root(model, optimizer))
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
