"""Have several processes, a device each, be one peer: data parallelism inside of a peer, as `torchrun` starts it.

    torchrun --nproc-per-node 2 -m p2ptrain join ADDR

Rank 0 is the peer. It alone has a network, a home, an optimizer and momentum. The other ranks hold the parameters, and
compute their share of each micro-batch that rank 0 deals. What enters the momentum is the mean over all ranks, so the
swarm sees one peer, with one identity and one contribution, and replicas are as they are without.

Ranks go in lockstep: each waits for an order of rank 0, which then calls the same collectives as the others. Orders and
tokens go by gloo, on the CPU, where a rank that waits costs no time of a device; parameters and gradients go by NCCL
where there are GPUs. A rank that ends closes its connections, on which all others end. Ranks trust each other: they are
processes of one owner. Cost beside the gradient's mean: parameters are sent anew after each round.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, Self, cast

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.config.manifest import open_manifest
from p2ptrain.errors import HomeError, P2PTrainError
from p2ptrain.models.gpt import GPT
from p2ptrain.models.of_manifest import recompute_activations, task_of
from p2ptrain.models.task import Task
from p2ptrain.optim.local import Local
from p2ptrain.training.machine import this_machine
from p2ptrain.training.passes import Passes
from p2ptrain.training.replica import build_local

WAIT_DAYS = 365
"""For an order of rank 0, which may rest for long. That a rank is gone shows at once."""


class Order(IntEnum):
    """What all ranks do next."""

    BEGIN = 1
    PARAMETERS = 2
    BATCH = 3
    GATHER = 4
    REST = 5
    END = 6


class Beginning(msgspec.Struct, frozen=True):
    """What a rank builds its model of."""

    signed_manifest: bytes
    values: str
    """Path of the run's first values; empty: there are none."""
    device: str
    recompute: bool


class RankGoneError(P2PTrainError):
    """Another process of this peer has ended."""


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    """Name the cause where a collective fails. Raises RankGoneError."""
    try:
        yield
    except RuntimeError as error:
        raise RankGoneError(
            "another process of this peer has ended", hint="its own words say why; then start torchrun again"
        ) from error


class Ranks:
    """What one process of a peer does together with the others.

    Args:
        rank, size: as `torchrun` numbers and counts them.
        local_size: how many of them share this machine.
        local_rank: which of those it is, and so which GPU it has; None: it is to have none.
    """

    def __init__(self, rank: int, size: int, local_size: int, local_rank: int | None) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        #: the others wait for an order: true of rank 0 but inside of a step that all take
        self._waited_for = True
        #: where the parameters stood that the others have
        self._version = b""
        self._parameters: Sequence[Tensor] = ()
        if local_rank is not None:
            torch.cuda.set_device(local_rank)
        with _all_there():
            dist.init_process_group("gloo", timeout=timedelta(days=WAIT_DAYS))
            self._tensors = None if local_rank is None else dist.new_group(backend="nccl")

    @classmethod
    def of_environment(cls, device: str) -> Self | None:
        """Return the processes that `torchrun` has started, of which this is one; None: it has started but one.

        Args:
            device: that the owner wants.

        Raises:
            HomeError: there is no GPU for each.
            RankGoneError: not all of them come.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size < 2:
            return None
        local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
        if on_gpus and torch.cuda.device_count() < local_size:
            raise HomeError(
                f"{local_size} processes, and {torch.cuda.device_count()} GPUs for them",
                hint=f"torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu",
            )
        return cls(int(os.environ["RANK"]), size, local_size, local_rank if on_gpus else None)

    @property
    def threads(self) -> int:
        """How many threads of each process have a core of their own; at least one."""
        return max(1, this_machine().threads // self.local_size)

    # ---- what all do at once: `optim.local.Together` -----------------------------------------------------------

    def agree(self, nats: float) -> float:
        """Return the mean of all ranks' losses: not finite where one of them is not."""
        found = torch.tensor([nats], dtype=torch.float64)
        with _all_there():
            dist.all_reduce(found)
        return found.item() / self.size

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Have each parameter's `grad` be the mean over all ranks; none is a gradient of zeros."""
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            with _all_there():
                dist.all_reduce(parameter.grad, group=self._group_of(parameter.grad))
            parameter.grad.div_(self.size)

    def _send_parameters(self) -> None:
        with torch.no_grad(), _all_there():
            for parameter in self._parameters:
                dist.broadcast(parameter.data, 0, group=self._group_of(parameter))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._tensors if tensor.device.type == "cuda" else None

    def _send(self, values: NDArray[Any]) -> None:
        with _all_there():
            dist.broadcast(torch.from_numpy(values), 0)

    # ---- rank 0 -----------------------------------------------------------------------------------------------

    def begin(self, beginning: Beginning) -> None:
        """Have the other ranks build the model."""
        data = np.frombuffer(bytearray(msgspec.msgpack.encode(beginning)), np.uint8)
        self._order(Order.BEGIN, len(data))
        self._send(data)
        self._version = b""

    def lead(self, local: Local, parameters: Sequence[Tensor]) -> Local:
        """Return what computes and gathers as `local` does, with all ranks."""
        self._parameters = parameters
        return _Led(self, local)

    def deal(
        self, batch: NDArray[Any], counted: NDArray[np.bool_] | None, passes: Passes, rate: float, version: bytes
    ) -> tuple[NDArray[Any], NDArray[np.bool_] | None] | None:
        """Give each rank its share of a micro-batch.

        Args:
            batch: tokens [size * passes.sequences, tokens of one].
            counted: which of them count; None: all.
            rate: the learning rate of inner steps.
            version: where the parameters stand.

        Returns:
            Rank 0's own share; None: there is too little in it for each rank to learn from.
        """
        if counted is not None:
            # A mean over nothing is no loss, so sequences with something to learn are dealt out first.
            teaches = counted[:, 1:].sum(axis=1) > 0
            if teaches.sum() < self.size:
                return None
            order = np.argsort(~teaches, kind="stable").reshape(-1, self.size).T.reshape(-1)
            batch, counted = batch[order], counted[order]
        if version != self._version:
            self._order(Order.PARAMETERS)
            self._send_parameters()
            self._version = version
        self._order(Order.BATCH, passes.sequences, batch.shape[1], passes.bfloat16, counted is not None, rate)
        self._waited_for = False
        self._send(np.ascontiguousarray(batch, np.int32))
        if counted is not None:
            self._send(np.ascontiguousarray(counted, np.uint8))
        return self._share(batch, counted, passes.sequences)

    def _share(
        self, batch: NDArray[Any], counted: NDArray[np.bool_] | None, sequences: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        own = slice(self.rank * sequences, (self.rank + 1) * sequences)
        return batch[own], None if counted is None else counted[own]

    def rest(self) -> None:
        """Have the other ranks give their memory back until `begin`."""
        self._parameters = ()
        if self._waited_for:
            self._order(Order.REST)

    def close(self) -> None:
        """End: the other ranks, too, at once."""
        self._parameters = ()
        if self._waited_for:
            with contextlib.suppress(RankGoneError):
                self._order(Order.END)
        # What waits for a rank in vain would wait here, too.
        self._waited_for = False

    def _order(self, order: Order, *values: float) -> None:
        header = np.zeros(8, np.float64)
        header[: 1 + len(values)] = order, *values
        self._send(header)

    # ---- the other ranks --------------------------------------------------------------------------------------

    def follow(self, threads: int) -> None:
        """Compute what rank 0 deals, until it ends.

        Args:
            threads: to compute with; 0: as many as there are for each process.

        Raises:
            RankGoneError: it, or another, is gone.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # They come to all ranks at once, and rank 0 finishes its round first.
            signal.signal(number, signal.SIG_IGN)
        torch.set_num_threads(threads or self.threads)
        follower: _Follower | None = None
        while True:
            order, *values = self._heard()
            match Order(int(order)):
                case Order.BEGIN:
                    data = np.zeros(int(values[0]), np.uint8)
                    self._send(data)
                    follower = _Follower(self, msgspec.msgpack.decode(data.tobytes(), type=Beginning))
                    self._parameters = follower.parameters
                case Order.PARAMETERS:
                    self._send_parameters()
                case Order.BATCH if follower is not None:
                    follower.compute(*values)
                case Order.GATHER if follower is not None:
                    follower.gather()
                case Order.REST:
                    follower, self._parameters = None, ()
                    if torch.cuda.is_initialized():
                        torch.cuda.empty_cache()
                case Order.END:
                    return

    def _heard(self) -> list[float]:
        header = np.zeros(8, np.float64)
        self._send(header)
        return [float(value) for value in header]

    def dealt(self, sequences: int, tokens: int, masked: bool) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
        """Return this rank's share of what rank 0 deals."""
        batch = np.zeros((self.size * sequences, tokens), np.int32)
        self._send(batch)
        counted = None
        if masked:
            mask = np.zeros(batch.shape, np.uint8)
            self._send(mask)
            counted = mask.astype(bool)
        own, own_counted = self._share(batch, counted, sequences)
        return cast(NDArray[np.int32], own), own_counted


class _Led:
    """Rank 0's side of computing and gathering."""

    def __init__(self, ranks: Ranks, local: Local) -> None:
        self._ranks, self._local = ranks, local

    def compute(self, loss: Any, sequences: int, rate: float) -> float:
        nats = self._local.compute(loss, sequences, rate)
        self._ranks._waited_for = True
        return nats

    def gather(self) -> None:
        self._ranks._order(Order.GATHER)
        self._ranks._waited_for = False
        self._local.gather()
        self._ranks._waited_for = True


class _Follower:
    """A model that computes its shares of micro-batches."""

    def __init__(self, ranks: Ranks, beginning: Beginning) -> None:
        manifest, _ = open_manifest(beginning.signed_manifest)
        self._ranks, self._device = ranks, torch.device(beginning.device)
        task: Task = task_of(manifest, Path(beginning.values) if beginning.values else None)
        self._model = cast(GPT, task.module.to(self._device))
        self.parameters = [parameter.tensor for parameter in task.parameters]
        self._local = build_local(torch.nn.ParameterList(self.parameters), manifest, ranks)
        if beginning.recompute:
            recompute_activations(self._model)

    def compute(self, sequences: float, tokens: float, bfloat16: float, masked: float, rate: float, *_: float) -> None:
        """Compute this rank's share of the micro-batch that comes."""
        passes = Passes(int(sequences), bool(bfloat16))
        batch, counted = self._ranks.dealt(passes.sequences, int(tokens), bool(masked))
        own = torch.from_numpy(batch).to(self._device, torch.int64)

        def loss() -> Tensor:
            with passes.precision(self._device):
                return self._model.loss(own, counted)

        self._local.compute(loss, passes.sequences, rate)

    def gather(self) -> None:
        """Have rank 0 have the mean of what was computed, and begin anew."""
        self._local.gather()
        for parameter in self.parameters:
            parameter.grad = None
