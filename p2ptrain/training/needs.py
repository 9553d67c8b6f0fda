"""What a peer of a run needs: memory, disk, traffic and time, said before anything is built.

Memory is a sum of terms, each with a name, so that whoever makes one smaller changes one constant. P are the parameters
that are trained, E the entries of their chunks (at least P: chunks at the edge of a matrix are padded), H parameters
that are held fixed.

    libraries               the process before it holds any model
    parameters   4 (P + H)  gradient 4 P      before the last step 4 P
    momentum     4 E        directions 8 E    (a running mean, and what it was before the step)
    at work      W E        what a step, the allocator and messages hold meanwhile
    activations             of the micro-batch, of each block and of some rows of the head
    writing      C (P + 2E) copies while a checkpoint or a snapshot is written, at the peak alone

Computing takes 6 floating-point operations a parameter and token, the embedding excepted, and those of attention
(Kaplan et al., arXiv 2001.08361, section 2.1). `docs/performance.md` has how far the sums are from what peers hold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2ptrain.config.manifest import Manifest, ModelConfig
from p2ptrain.errors import TooLargeError
from p2ptrain.training.machine import Machine, free_disk_bytes

LIBRARIES_BYTES = 700 * 10**6
AT_WORK_BYTES = 14
"""An entry of a chunk."""
WRITING_COPIES = 1.0
"""Of what a checkpoint holds."""
CHECKPOINTS_A_DAY = 86_400 / 60
"""At most."""
CHECKPOINT_BYTES_A_DAY = 20e9
"""Written for checkpoints at most: a cheap SSD of 100 TB stands that for years."""
SNAPSHOTS_KEPT = 3
ACTIVATIONS_A_LAYER = 21
"""Float32 values a token, for each entry of the width, that a block keeps for its backward pass; MLP ratio 4."""
HEAD_ROWS = 256
"""Whose logits are made at once (`models/gpt.py`)."""
LOGITS_COPIES = 3
STEP_SECONDS = 16e-9
"""Of one core, for a parameter: accumulating, selecting, applying and settling, with a new run's directions."""
EFFICIENCY = 0.5
"""Of a large product's speed, that a training step reaches."""
BITS_SENT, BITS_KEPT = 2.0, 8.0
"""Beside its place, what a coefficient takes in a contribution and in a reply."""
LINE_BITS = 10e6
_CHUNK, _SIDE = 4096, 64


@dataclass(frozen=True, slots=True)
class Needs:
    """What a peer needs."""

    parameters: int
    memory_bytes: Mapping[str, int]
    """By term, at the peak."""
    writing: str
    """The term that steady memory lacks."""
    disk_bytes: int
    next_bytes: int
    """Of that, what the next checkpoint and the next snapshot take while those before them are still there."""
    written_bytes_a_day: int
    join_bytes: int
    """That a newcomer fetches."""
    round_bytes: int
    """That a peer sends in a round of many, and receives; alone it sends none."""
    tokens_a_round: int
    """Of all peers together."""
    tokens_at_once: int
    """Of a micro-batch: no round of a peer is shorter."""
    sequences_at_once: int
    total_rounds: int
    step_seconds: float
    """Of a round's optimizer on this machine."""
    flops_a_token: float
    max_round_seconds: float
    fixed_parameters: int = 0

    @property
    def peak_bytes(self) -> int:
        """Memory at its peak."""
        return sum(self.memory_bytes.values())

    @property
    def steady_bytes(self) -> int:
        """Memory between two peaks."""
        return self.peak_bytes - self.memory_bytes.get(self.writing, 0)

    @property
    def least_bytes(self) -> int:
        """Memory at its peak where sequences are computed one by one, as a peer does that has not got more."""
        activations = self.memory_bytes["activations"]
        return self.peak_bytes - activations + activations // self.sequences_at_once

    def round_seconds(self, flops: float) -> float:
        """Return how long a round of a peer alone is, at so many operations a second."""
        whole, least = (self.flops_a_token * tokens / flops for tokens in (self.tokens_a_round, self.tokens_at_once))
        return max(min(whole, self.max_round_seconds), least) + self.step_seconds

    def as_json(self, machine: Machine, flops: float | None = None) -> dict[str, Any]:
        """Return all of it, with what there is."""
        found: dict[str, Any] = {
            "parameters": self.parameters,
            "memory": {**self.memory_bytes, "steady": self.steady_bytes, "peak": self.peak_bytes},
            "disk_bytes": self.disk_bytes,
            "written_bytes_a_day": self.written_bytes_a_day,
            "join_bytes": self.join_bytes,
            "round_bytes": self.round_bytes,
            "machine": asdict(machine),
        }
        if flops is not None:
            seconds = self.round_seconds(flops)
            found["round_seconds_alone"] = round(seconds, 3)
            found["days_alone"] = round(seconds * self.total_rounds / 86_400, 3)
        return found

    def lines(self, machine: Machine, disk_bytes: int, flops: float | None = None) -> Iterator[str]:
        """Yield it for people: what is needed beside what there is."""
        yield (
            f"memory {size(self.peak_bytes)} at its peak, {size(self.steady_bytes)} between; "
            f"{machine.memory_limit} allows {size(machine.memory_bytes)}, of which {size(machine.free_bytes)} are free"
        )
        yield (
            f"disk {size(self.disk_bytes)} of {size(disk_bytes)} free, "
            f"and {size(self.written_bytes_a_day)} written a day"
        )
        yield (
            f"a newcomer fetches {size(self.join_bytes)}; a round among others sends {size(self.round_bytes)} and "
            f"receives as much, {8 * self.round_bytes / LINE_BITS:.2g} s at 10 Mbit/s"
        )
        if flops is not None:
            yield self.pace(flops)

    def pace(self, flops: float) -> str:
        """Return how long rounds are here, at so many operations a second, for people."""
        seconds = self.round_seconds(flops)
        whole = self.flops_a_token * self.tokens_a_round / flops
        alone = f"a round takes this machine about {duration(seconds)} alone"
        computing = seconds - self.step_seconds
        if whole > 1.05 * computing:
            alone += f", in which it computes {computing / whole:.2g} of the batch"
        return f"{alone}; {self.total_rounds:,} of them take {duration(seconds * self.total_rounds)}"

    def check(self, machine: Machine, home: Path, *, force: str, most_disk_bytes: int = 0) -> None:
        """Refuse what this machine cannot hold.

        Args:
            most_disk_bytes: that the home may hold; 0: no limit.
            force: the command that goes on all the same.

        Raises:
            TooLargeError: with what is needed and what there is.
        """
        if self.least_bytes > machine.memory_bytes:
            raise TooLargeError(
                f"a peer of this run needs {size(self.least_bytes)} of memory, and {machine.memory_limit} allows "
                f"{size(machine.memory_bytes)}: {self.parameters:,} parameters are too many for it",
                hint=f"a smaller model, as p2ptrain init --size {self.largest_size(machine)}; or {force} all the same",
            )
        if 0 < most_disk_bytes < self.disk_bytes:
            raise TooLargeError(
                f"a peer of this run needs {size(self.disk_bytes)} of disk, and --max-disk allows "
                f"{size(most_disk_bytes)}",
                hint=f"allow more; or {force} all the same",
            )
        free = free_disk_bytes(home)
        if self.disk_bytes > free:
            raise TooLargeError(
                f"a peer of this run needs {size(self.disk_bytes)} of disk, and where {home} is {size(free)} are free",
                hint=f"make room, or choose another home with --home DIR; or {force} all the same",
            )

    def largest_size(self, machine: Machine) -> str:
        """Return the largest size that this machine holds."""
        from p2ptrain.config.loading import new_manifest
        from p2ptrain.config.sizes import SIZES

        peaks = {one: needs_of(new_manifest("any", size=one)).least_bytes for one in SIZES}
        return max((one for one in SIZES if peaks[one] <= machine.memory_bytes), key=peaks.__getitem__, default="1M")


def needs_of(manifest: Manifest, chunks: int | None = None, machine: Machine | None = None) -> Needs:
    """Return what a peer of a run needs.

    Args:
        chunks: that the trained parameters take; None: those of the built-in GPT, or as many as matrices have.
        machine: whose cores take a step; None: one core.
    """
    task, optimizer, rules = manifest.task_config, manifest.optimizer, manifest.round
    trained = manifest.parameters
    fixed = task.values_parameters if task is not None and task.lora_config is not None else 0
    own = task is None or task.kind == "gpt"
    if chunks is None:
        chunks = gpt_chunks(manifest.model) if own else math.ceil(1.02 * trained / _CHUNK)
    entries, threads = chunks * _CHUNK, 1 if machine is None else machine.threads
    memory = {
        "libraries": LIBRARIES_BYTES,
        "parameters": 4 * (trained + fixed),
        "gradient": 4 * trained,
        "before the last step": 4 * trained,
        "momentum": 4 * entries,
        "directions": 8 * entries,
        "at work": AT_WORK_BYTES * entries,
        "activations": activations_bytes(manifest),
    }
    if optimizer.look_ahead or optimizer.gathers_way:
        memory["inner steps"] = 16 * trained
    if manifest.data.token_file is None:
        memory["text"] = manifest.data.bytes
    writing = "writing"
    checkpoint, snapshot = 4 * (trained + 2 * entries), 4 * (trained + entries)
    memory[writing] = int(WRITING_COPIES * checkpoint)
    kept = {kind: getattr(optimizer, kind) for kind in ("matrix", "embedding", "head", "vector")}
    sent = chunks * _payload_bytes(max(of.topk for of in kept.values()), BITS_SENT)
    replies = chunks * _payload_bytes(max(of.reply_topk for of in kept.values()), BITS_KEPT)
    file = manifest.data.token_file
    text = 0 if file is None else file.bytes
    values = 0 if task is None else task.values.bytes
    journal = int(SNAPSHOTS_KEPT * rules.root_interval * replies)
    return Needs(
        parameters=trained,
        memory_bytes=memory,
        writing=writing,
        # A file is replaced by one that is whole, so each is there twice for a while.
        disk_bytes=2 * checkpoint + (SNAPSHOTS_KEPT + 1) * snapshot + journal + text + values,
        next_bytes=checkpoint + snapshot,
        written_bytes_a_day=int(min(CHECKPOINTS_A_DAY * checkpoint, CHECKPOINT_BYTES_A_DAY)),
        join_bytes=int(snapshot + rules.root_interval * replies / 2) + text + values,
        round_bytes=int(sent + replies),
        tokens_a_round=manifest.context * _sequences(manifest),
        sequences_at_once=rules.micro_batch,
        tokens_at_once=manifest.context * min(rules.micro_batch, _sequences(manifest)),
        total_rounds=optimizer.total_rounds,
        step_seconds=STEP_SECONDS * entries / threads,
        flops_a_token=flops_a_token(manifest),
        max_round_seconds=rules.max_seconds if rules.pace == "time" else math.inf,
        fixed_parameters=fixed,
    )


def _sequences(manifest: Manifest) -> int:
    rules = manifest.round
    return rules.target_batch if rules.pace == "time" else rules.sequences_per_peer


def _payload_bytes(topk: int, bits: float) -> float:
    """Return what so many coefficients of a chunk take: the entropy of their places, and what they are worth."""
    places = (math.lgamma(_CHUNK + 1) - math.lgamma(topk + 1) - math.lgamma(_CHUNK - topk + 1)) / math.log(2)
    return (places + bits * topk) / 8


def gpt_chunks(model: ModelConfig) -> int:
    """Return how many chunks the built-in GPT takes, as `compression/layout.py` cuts it."""
    wide, hidden = math.ceil(model.embedding / _SIDE), math.ceil(model.embedding * model.mlp_ratio / _SIDE)
    gain = math.ceil(model.embedding / _CHUNK)
    rows, thrice = math.ceil(model.vocabulary / _SIDE), math.ceil(3 * model.embedding / _SIDE)
    block = thrice * wide + wide * wide + 2 * hidden * wide + 2 * gain
    return 2 * rows * wide + model.layers * block + gain


def activations_bytes(manifest: Manifest) -> int:
    """Return what forward and backward pass of a micro-batch hold, of a model that is like the built-in one."""
    tokens = manifest.round.micro_batch * manifest.context
    task = manifest.task_config
    if task is not None and task.kind == "hf":
        # Other architectures make all logits at once, which is most of what they hold.
        width = math.sqrt(max(task.values_parameters, 1) / 12 / 12)
        return int(tokens * 4 * (LOGITS_COPIES * manifest.vocabulary + 12 * ACTIVATIONS_A_LAYER * width))
    model = manifest.model
    a_layer = ACTIVATIONS_A_LAYER * model.embedding * (0.6 + 0.1 * model.mlp_ratio)
    head = LOGITS_COPIES * min(tokens, HEAD_ROWS) * model.vocabulary
    return int(4 * (tokens * model.layers * a_layer + head))


def flops_a_token(manifest: Manifest) -> float:
    """Return the operations that forward and backward pass take for a token."""
    task, model = manifest.task_config, manifest.model
    if task is not None and task.kind != "gpt":
        return 6.0 * task.values_parameters
    counted = model.parameters - model.vocabulary * model.embedding
    return 6.0 * counted + 6.0 * model.layers * model.embedding * model.context


def measured_flops(seconds: float = 0.2) -> float:
    """Return about how many operations a second a training step reaches here, from products of matrices on the CPU."""
    import numpy as np  # here, because the command line's help needs none of it

    side = 768
    left = np.ones((side, side), np.float32)
    out = left @ left
    count, began = 0, time.monotonic()
    while (took := time.monotonic() - began) < seconds:
        np.matmul(left, left, out=out)
        count += 1
    return EFFICIENCY * count * 2 * side**3 / took


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit, bytes_a_unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= bytes_a_unit:
            return f"{count / bytes_a_unit:.3g} {unit}" if count < 1000 * bytes_a_unit else f"{count:,.0f} {unit}"
    return f"{count / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Return a time for people."""
    for unit, seconds_a_unit in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * seconds_a_unit:
            return f"{seconds / seconds_a_unit:.3g} {unit}"
    return f"{seconds:.2g} s"
