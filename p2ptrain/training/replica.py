"""The replica: what is trained and its optimizer, as the manifest describes them, and where on the chain they stand.

Everything here is the same bits on every peer at the same state id, except for the optimizer's momentum, which is this
peer's own. A step can be undone once: parameters from before the last seal are kept, one copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import torch
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
from p2ptrain.optim.local import InnerSteps, Local, LookAhead, MeanGradient
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.optim.settling import PartReply
from p2ptrain.state.tensors import Arrays, TensorFileError, pack_tensors, packed_bytes, unpack_tensors

_KINDS: tuple[Kind, ...] = ("matrix", "embedding", "head", "vector")
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
        parameters = [parameter.tensor.detach().clone() for parameter in self.task.parameters]
        # Directions replace their state and never change it in place, so references are copies enough.
        self._before = _Before(self.chain, parameters, self.optimizer.replicated_state())
        gathers_way = self.manifest.optimizer.gathers_way
        rate = self.manifest.optimizer.outer_learning_rate if gathers_way else self.rate_at(sealed.seal.round)
        if sealed.seal.included.strip(b"\0"):
            self.optimizer.apply(replies, rate)
        self.chain = state
        return replies

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
        with torch.no_grad():
            for parameter, before in zip(self.task.parameters, self._before.parameters, strict=True):
                parameter.tensor.copy_(before)
        self.optimizer.load_replicated_state(self._before.replicated)
        self.chain, self._before = self._before.chain, None

    # ---- as bytes ---------------------------------------------------------------------------------------------

    def arrays(self) -> Arrays:
        """What all replicas hold alike, as float32 arrays; on the CPU they are views of the live tensors."""
        return {name: tensor.detach().cpu().numpy() for name, tensor in self._replicated().items()}

    def load_arrays(self, arrays: Arrays, chain: ChainState) -> None:
        """Inverse of `arrays`, for a replica at `chain`."""
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        with torch.no_grad():
            for parameter in self.task.parameters:
                parameter.tensor.copy_(tensors[f"p.{parameter.name}"])
        state = {name.removeprefix("r."): tensor for name, tensor in tensors.items() if name.startswith("r.")}
        self.optimizer.load_replicated_state(state)
        self.chain, self._before = chain, None

    def snapshot(self) -> bytes:
        """The replica and its place on the chain; the same bytes on every peer."""
        return pack_tensors(msgspec.msgpack.encode(self.chain), self.arrays())

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


def build_local(model: torch.nn.Module, manifest: Manifest) -> Local:
    """What the manifest's strategy has a peer do on its own."""
    config = manifest.optimizer
    # Keys of a manifest keep their names, which a run's id hashes. These three are AdamW's, and a factor on its rate.
    beta1, beta2, epsilon = config.direction_momentum, config.rms_beta, config.rms_epsilon
    rate_factor, batch = config.look_ahead, config.inner_batch
    if rate_factor:
        return LookAhead(model, rate_factor=rate_factor, batch=batch, beta1=beta1, beta2=beta2, epsilon=epsilon)
    if not config.gathers_way:
        return MeanGradient(model)
    decay = config.weight_decay
    return InnerSteps(model, batch=batch, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=decay)
