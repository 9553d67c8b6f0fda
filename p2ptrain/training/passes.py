"""How this peer computes a micro-batch: in which precision, and how many sequences at once.

None of it is the swarm's business: gradients are a peer's own, and replicas stay equal to the bit whatever each peer
computes in. Parameters and the sums of gradients are float32 always; in bfloat16 are products, by torch's autocast.

What fits is measured before the first round, on the model as it is: forward passes of one and of two sequences say what
is kept for the backward pass, and that grows evenly with the sequences. On a CPU that has to do, because a system kills
a process that holds too much and raises nothing; where an allocator does raise, the trainer halves once more and goes
on. Cost: two forward passes and one or two whole ones.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from p2ptrain.training.machine import Machine
from p2ptrain.training.needs import duration, size

BFLOAT16_PARAMETERS = 5_000_000
"""Smaller models are computed in float32 where nobody says otherwise: they gain little."""
GAIN = 0.9
"""Another precision, or twice the sequences, has to take less than so much of the time."""
BESIDE_KEPT = 1.3
"""Over what is kept for the backward pass, what both passes hold at most."""
TRIALS_SECONDS = 20.0
"""A size is not tried any more when trials have taken so long."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Passes:
    """See the module docstring."""

    sequences: int
    """Of a micro-batch."""
    bfloat16: bool = False
    seconds_a_sequence: float = 0.0
    """As measured; 0: it was not."""

    @contextlib.contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Compute a loss inside of this."""
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            yield

    def halved(self) -> Passes:
        """Return the same with half as many sequences at once. Raises MemoryError: it is one already."""
        if self.sequences == 1:
            raise MemoryError("not even one sequence fits")
        return replace(self, sequences=self.sequences // 2)


def out_of_memory(error: BaseException) -> bool:
    """Say whether an allocator has refused: those of CUDA, of the CPU, and Python's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "t allocate memory" in str(error)


def kept_bytes(loss: Callable[[int], Tensor], model: nn.Module, sequences: int) -> int:
    """Return what a forward pass keeps for the backward pass, parameters excepted.

    Args:
        loss: of so many sequences.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(sequences)
    return sum(count for pointer, count in found.items() if pointer not in own)


def choose(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    device: torch.device,
    *,
    wanted: int,
    most: int,
    grow: bool,
    precision: str,
    machine: Machine,
    reserved_bytes: int,
) -> Passes:
    """Try out how this device computes the model best, within its memory.

    Args:
        loss: of so many sequences, whatever they are; gradients of it are discarded.
        wanted: sequences at once, as the run or this machine's owner says.
        most: that a peer can use in a round.
        grow: try more than are wanted, as long as that is faster.
        precision: auto, float32 or bfloat16.
        reserved_bytes: that this process is yet to hold beside what is kept for backward passes.
    """
    began = time.monotonic()
    passes = Passes(max(1, min(wanted, most)), bfloat16=precision == "bfloat16")
    with passes.precision(device):
        one, two = (kept_bytes(loss, model, count) for count in (1, 2))
    # Most of a sequence is alike for each; what is not is taken for more, not for less.
    a_sequence = max(two - one, one / 2)
    free = _free_bytes(device, machine) - reserved_bytes

    def fits(sequences: int) -> bool:
        return BESIDE_KEPT * (max(one - a_sequence, 0) + sequences * a_sequence) <= free

    while passes.sequences > 1 and not fits(passes.sequences):
        passes = passes.halved()
    if passes.sequences < min(wanted, most):
        _logger.warning(
            "a micro-batch of %d sequences keeps %s, and %s are left for it: halved to %d",
            wanted,
            size(wanted * a_sequence),
            size(max(free, 0)),
            passes.sequences,
        )
    passes = replace(passes, seconds_a_sequence=_seconds(model, loss, device, passes))
    if precision == "auto" and _may_be_bfloat16(model, device, machine):
        other = replace(passes, bfloat16=True)
        other = replace(other, seconds_a_sequence=_seconds(model, loss, device, other))
        if other.seconds_a_sequence < GAIN * passes.seconds_a_sequence:
            passes = other
    while grow and 2 * passes.sequences <= most and fits(2 * passes.sequences):
        if time.monotonic() - began > TRIALS_SECONDS:
            break
        try:
            larger = replace(passes, sequences=2 * passes.sequences)
            larger = replace(larger, seconds_a_sequence=_seconds(model, loss, device, larger))
        except Exception as error:
            if not out_of_memory(error):
                raise
            break
        if larger.seconds_a_sequence > GAIN * passes.seconds_a_sequence:
            break
        passes = larger
    _logger.info(
        "computes %d sequences at once in %s, %s each",
        passes.sequences,
        "bfloat16" if passes.bfloat16 else "float32",
        duration(passes.seconds_a_sequence),
    )
    return passes


def _seconds(model: nn.Module, loss: Callable[[int], Tensor], device: torch.device, passes: Passes) -> float:
    """Return what forward and backward pass take for a sequence, of two times the better one."""
    times = []
    for _ in range(2):
        began = time.monotonic()
        with passes.precision(device):
            value = loss(passes.sequences)
        value.backward()
        value.item()
        times.append((time.monotonic() - began) / passes.sequences)
        let_go(model, device)
    return min(times)


def let_go(model: nn.Module, device: torch.device) -> None:
    """Discard gradients, and give back what they and a pass that was broken off have held."""
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _free_bytes(device: torch.device, machine: Machine) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.free_bytes


def _may_be_bfloat16(model: nn.Module, device: torch.device, machine: Machine) -> bool:
    if sum(parameter.numel() for parameter in model.parameters()) < BFLOAT16_PARAMETERS:
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and machine.bfloat16
