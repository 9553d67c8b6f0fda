"""The replica: what is trained and its optimizer, as the manifest describes them, and where on the chain they stand.

Everything here is the same bits on every peer at the same state id, except for the optimizer's momentum, which is this
peer's own. A step can be undone once: parameters from before the last seal are kept, one copy. What is written of it by
another thread is as it was when it was frozen, whatever steps are taken meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.chain import ChainState, RoundShape
from p2ptrain.chain.evidence import body_of
from p2ptrain.chain.sealed import SealedRound
from p2ptrain.compression import decoded
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.layout import ChunkLayout, Kind
from p2ptrain.config.manifest import GroupConfig, Manifest
from p2ptrain.models.of_manifest import task_of
from p2ptrain.models.task import Task, TrainedParameter, gpt_parameters
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.local import ALONE, InnerSteps, Local, LookAhead, MeanGradient, Together
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.optim.settling import PartReply
from p2ptrain.state.checkpoint import MOMENTUM
from p2ptrain.state.frozen import Frozen
from p2ptrain.state.tensors import Arrays, TensorFileError, pack_head, pack_tensors, packed_bytes, unpack_tensors

_KINDS: tuple[Kind, ...] = ("matrix", "embedding", "head", "vector")
AT_ONCE_BYTES = 1024 * 1024
"""A snapshot shorter than this is made whole; of longer ones nothing as long is ever one piece of memory."""
_CHAIN_STATE_MAX_BYTES = 1024 * 1024
_chain_decoder = msgspec.msgpack.Decoder(ChainState)


@dataclass(frozen=True, slots=True)
class _Before:
    """What it takes to undo one step."""

    chain: ChainState
    parameters: list[Tensor]
    replicated: dict[str, Tensor]


class Replica:
    """See the module docstring.

    Args:
        run_id: id of the chain's beginning.
        device: where to compute; None: where the task's module is.
        task: default: the GPT that the manifest describes, from its beginning.
    """

    def __init__(
        self, manifest: Manifest, run_id: bytes, device: torch.device | None, task: Task | None = None
    ) -> None:
        self.manifest, self.run_id = manifest, run_id
        self.task = task_of(manifest, None) if task is None else task
        self.model = self.task.module
        self.task.begin()
        if device is not None:
            self.model.to(device)
        self.optimizer = optimizer_of(self.task.parameters, manifest)
        #: where the parameters stand
        self.chain: ChainState = self.beginning
        self._before: _Before | None = None
        #: where parameters from before a step lie; made at the first one
        self._room: list[Tensor] = []
        #: what is being written of this replica -> steps taken since it was frozen
        self._frozen: dict[Frozen, int] = {}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._replicated().items()}

    @property
    def beginning(self) -> ChainState:
        """The chain before its first seal."""
        return self.manifest.beginning(self.run_id)

    @property
    def layout(self) -> ChunkLayout:
        """Chunks of all parameters."""
        return self.optimizer.layout

    @property
    def codec(self) -> Codec:
        """What all peers agree on about payloads."""
        return self.optimizer.codec

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what all replicas hold alike."""
        return self._shapes

    def reset(self) -> None:
        """Back to the run's beginning; the momentum stays."""
        self._all_changes()
        self.task.begin()
        fresh = optimizer_of(self.task.parameters, self.manifest)
        self.optimizer.load_replicated_state(fresh.replicated_state())
        self.chain, self._before = self.beginning, None

    # ---- steps ------------------------------------------------------------------------------------------------

    def apply(self, sealed: SealedRound, shape: RoundShape, state: ChainState) -> list[PartReply]:
        """Take the step of a sealed round that continues `chain`, after which it is `state`; returns its replies."""
        replies: list[PartReply] = []
        for part, data in zip(shape.parts, sealed.replies, strict=True):
            content = None
            if data is not None:
                content = decoded.reply(body_of(data), self.codec, part.start, part.end, len(shape.members))
            replies.append((part.start, part.end, content))
        self._keep_before()
        gathers_way = self.manifest.optimizer.gathers_way
        rate = self.manifest.optimizer.outer_learning_rate if gathers_way else self.rate_at(sealed.seal.round)
        if sealed.seal.included.strip(b"\0"):
            self.optimizer.apply(replies, rate)
        self.chain = state
        return replies

    def _keep_before(self) -> None:
        """Keep what it takes to undo the step that comes, in the place of what the last one left."""
        self._frozen = {frozen: steps for frozen, steps in self._frozen.items() if not frozen.done}
        for frozen, steps in self._frozen.items():
            if steps:  # what is not written of it lies where the step before last left it
                frozen.keep(self._shapes)
        if not self._room:
            self._room = [torch.empty_like(parameter.tensor) for parameter in self.task.parameters]
        with torch.no_grad():
            for room, parameter in zip(self._room, self.task.parameters, strict=True):
                room.copy_(parameter.tensor)
        for frozen, steps in self._frozen.items():
            if not steps and self._on_cpu_only:
                frozen.moved({f"p.{p.name}": _on_cpu(r) for p, r in zip(self.task.parameters, self._room, strict=True)})
            self._frozen[frozen] = steps + 1
        # Directions replace their state, and change what they had before only at the step after.
        self._before = _Before(self.chain, self._room, self.optimizer.replicated_state())

    # ---- what is written meanwhile ----------------------------------------------------------------------------

    def freeze(self, *, momentum: bool) -> Frozen:
        """Return `arrays` as they are now, for a thread that writes them while training goes on.

        Args:
            momentum: whether this peer's own comes before them, as `MOMENTUM`.
        """
        own = {MOMENTUM: _on_cpu(self.optimizer.momentum)} if momentum else {}
        frozen = Frozen(own | self.arrays(), changing=self._on_cpu_only)
        self._frozen[frozen] = 0
        return frozen

    def momentum_changes(self) -> None:
        """Say that the momentum is about to change: what is frozen of it and not written yet is copied."""
        for frozen in self._frozen:
            frozen.keep((MOMENTUM,))

    def _all_changes(self) -> None:
        """All that all replicas hold alike is about to change otherwise than by a step."""
        for frozen in self._frozen:
            frozen.keep(self._shapes)

    @property
    def _on_cpu_only(self) -> bool:
        """Whether arrays are views of the tensors."""
        return self.optimizer.momentum.device.type == "cpu"

    def rate_at(self, round: int) -> float:
        """The learning rate that the manifest sets for a round."""
        optimizer = self.manifest.optimizer
        return learning_rate(
            round,
            peak=optimizer.learning_rate,
            warmup_rounds=optimizer.warmup_rounds,
            total_rounds=optimizer.total_rounds,
            final_fraction=optimizer.final_fraction,
        )

    def undo(self) -> None:
        """Undo the last `apply`.

        Raises:
            ValueError: nothing to undo.
        """
        if self._before is None:
            raise ValueError("no step to undo")
        self._all_changes()
        with torch.no_grad():
            for parameter, before in zip(self.task.parameters, self._before.parameters, strict=True):
                parameter.tensor.copy_(before)
        self.optimizer.load_replicated_state(self._before.replicated)
        self.chain, self._before = self._before.chain, None

    # ---- as bytes ---------------------------------------------------------------------------------------------

    def arrays(self) -> Arrays:
        """What all replicas hold alike, as float32 arrays; on the CPU they are views of the live tensors."""
        return {name: _on_cpu(tensor) for name, tensor in self._replicated().items()}

    def load_arrays(self, arrays: Arrays, chain: ChainState) -> None:
        """Inverse of `arrays`, for a replica at `chain`."""
        self._all_changes()
        # Nothing is there to undo afterwards, so the directions' state may change where it lies.
        for name, tensor in self._replicated().items():
            fill(tensor, arrays[name])
        self.chain, self._before = chain, None

    def snapshot(self) -> bytes:
        """The replica and its place on the chain; the same bytes on every peer."""
        return pack_tensors(msgspec.msgpack.encode(self.chain), self.arrays())

    def freeze_snapshot(self) -> tuple[bytes, Frozen | None]:
        """Return the bytes of `snapshot` as they are now, for a thread that writes them: some, and then the rest."""
        if packed_bytes(self._shapes, 0) < AT_ONCE_BYTES:
            return self.snapshot(), None
        return pack_head(msgspec.msgpack.encode(self.chain), self._shapes), self.freeze(momentum=False)

    @property
    def snapshot_max_bytes(self) -> int:
        """No snapshot of this run is longer."""
        return packed_bytes(self._shapes, _CHAIN_STATE_MAX_BYTES)

    def load_snapshot(self, data: bytes) -> None:
        """Inverse of `snapshot`.

        Raises:
            TensorFileError: not a snapshot of this run.
        """
        meta, arrays = unpack_tensors(data, self._shapes)
        self.load_arrays(arrays, chain_of(meta, self.run_id))

    @property
    def snapshot_chain(self) -> Callable[[bytes], ChainState]:
        """Says where on the chain a snapshot's bytes stand, on any thread; it raises TensorFileError."""
        return partial(_chain_of_snapshot, dict(self._shapes), self.run_id)

    def parameters_sha256(self) -> str:
        """Hash of all parameters that are trained, in the model's order."""
        digest = hashlib.sha256()
        for parameter in self.task.parameters:
            digest.update(np.ascontiguousarray(parameter.tensor.detach().cpu().numpy(), "<f4").data)
        return digest.hexdigest()

    def _replicated(self) -> dict[str, Tensor]:
        named = {f"p.{parameter.name}": parameter.tensor.data for parameter in self.task.parameters}
        return named | {f"r.{name}": tensor for name, tensor in self.optimizer.replicated_state().items()}


def _on_cpu(tensor: Tensor) -> NDArray[np.float32]:
    """Return a tensor's values: a view, where it is on the CPU."""
    return tensor.detach().cpu().numpy()


def fill(tensor: Tensor, array: NDArray[np.float32]) -> None:
    """Write an array's values where a tensor has its own, without a copy on the CPU."""
    if tensor.device.type == "cpu":
        np.copyto(tensor.detach().numpy(), array)
    else:
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(np.array(array)))


def _chain_of_snapshot(shapes: dict[str, tuple[int, ...]], run_id: bytes, data: bytes) -> ChainState:
    return chain_of(unpack_tensors(data, shapes)[0], run_id)


def chain_of(meta: bytes, run_id: bytes) -> ChainState:
    """The chain state in a snapshot's meta. Raises TensorFileError."""
    try:
        state = _chain_decoder.decode(meta)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise TensorFileError(f"without a chain state: {error}") from error
    if state.run_id != run_id:
        raise TensorFileError("of another run")
    return state


def build_optimizer(model: torch.nn.Module, manifest: Manifest) -> DeMo:
    """Return `optimizer_of` all parameters of the built-in GPT."""
    return optimizer_of(gpt_parameters(model), manifest)


def optimizer_of(parameters: Sequence[TrainedParameter], manifest: Manifest) -> DeMo:
    """Return DeMo as the manifest sets it, one parameter group for each kind of parameter, with the run's codec."""
    config = manifest.optimizer
    groups = []
    for kind in _KINDS:
        treatment: GroupConfig = getattr(config, kind)
        groups.append(
            {
                "params": [parameter.tensor for parameter in parameters if parameter.kind == kind],
                "transform": treatment.transform,
                "direction": treatment.direction,
                "topk": treatment.topk,
                "reply_topk": treatment.reply_topk,
                "learning_rate_scale": treatment.learning_rate_scale,
            }
        )
    optimizer = DeMo(
        groups,
        config.learning_rate,
        beta=config.beta,
        weight_decay=0.0 if config.gathers_way else config.weight_decay,
        value_bits=manifest.codec.value_bits,
        rms_beta=config.rms_beta,
        rms_epsilon=config.rms_epsilon,
        direction_momentum=config.direction_momentum,
    )
    rules = manifest.round
    optimizer.codec = replace(
        optimizer.codec,
        clip_ratio=rules.clip_ratio,
        weight_cap_ratio=rules.weight_cap_ratio,
        robust=rules.sums_by,
    )
    return optimizer


def build_local(model: torch.nn.Module, manifest: Manifest, together: Together = ALONE) -> Local:
    """What the manifest's strategy has a peer do on its own.

    Args:
        together: the processes that this peer is.
    """
    config = manifest.optimizer
    # Keys of a manifest keep their names, which a run's id hashes. These three are AdamW's, and a factor on its rate.
    beta1, beta2, epsilon = config.direction_momentum, config.rms_beta, config.rms_epsilon
    rate_factor, batch = config.look_ahead, -(-config.inner_batch // together.size)
    if rate_factor:
        return LookAhead(
            model, together, rate_factor=rate_factor, batch=batch, beta1=beta1, beta2=beta2, epsilon=epsilon
        )
    if not config.gathers_way:
        return MeanGradient(model, together)
    decay = config.weight_decay
    return InnerSteps(model, together, batch=batch, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=decay)
