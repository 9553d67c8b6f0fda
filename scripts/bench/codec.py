"""What an optimizer step costs without a network, and what a contribution weighs.

A step is a round of a group of one, by way of its bytes: accumulate, select, encode, reduce, decode, apply, settle,
on a GPT of 15 million parameters, TOPK coefficients a chunk and steps of signs, as DeMo takes them, with the parts and
threads that such a group has. What a peer wrote itself it does not decode; `codec_...` says what that takes. `lone` is
`DeMo.step`, which takes the same step without making bytes of it, and `lone_of_a_new_run` with the coefficients and
directions of the default manifest. Beside them, in turns and each on parameters of its own with the same gradients:
DeMo as the paper writes it (`lab/baseline_demo.py`, which makes no bytes either; once more with its products laid out
for speed, as `..._tuned`), AdamW foreach and AdamW fused. Ratios are of the same turn; torch's default number of
threads.
Gradients are normal random numbers, so indices lie evenly, which is the most they can cost.

Bits are those of a contribution to each of PARTS reducers, with the frames, headers and hashes of its messages.

Where there is a CUDA device, `cuda` holds the step of a model of a billion parameters on it: what runs on the device
(accumulate, select with its copy to the host, apply, settle), with the replies at hand; else null.

Takes under a minute on two cores; progress on stderr, one JSON object last on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import torch
from lab.baseline_demo import StraightforwardDeMo
from lab.report import Watch, finish, machine, note

from p2ptrain import chain
from p2ptrain.calls.messages import ContributionHeader, Tip, Traffic
from p2ptrain.chain import Row
from p2ptrain.compression import decoded, wire
from p2ptrain.compression.layout import SIDE
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.config.manifest import Manifest, ModelConfig, OptimizerConfig
from p2ptrain.models.gpt import GPT
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.settling import PartReply, Pending
from p2ptrain.training.replica import build_optimizer
from p2ptrain.training.selftest import make_ready

STEP_MODEL = ModelConfig(layers=7, heads=6, embedding=384)
CODEC_MODEL = ModelConfig(layers=4, heads=6, embedding=384)
GPU_MODEL = {"layers": 18, "embedding": 2048, "vocabulary": 32_768}
"""A GPT of a billion parameters."""
LEARNING_RATE, TOPK = 1e-4, 32
PARTS = 4
WARM_UP, TURNS_MIN, STEP_SECONDS = 2, 5, 25.0
GRADIENTS = 2
"""Sets of gradients, used by turns."""
ON_DEVICE = ("accumulate_and_select", "apply", "settle")
"""Phases of a step that run on a GPU, where there is one."""
GPU_TURNS = 8
REDUCERS = ThreadPoolExecutor(chain.PARTS_PER_REDUCER_MAX)
Ranges = Sequence[tuple[int, int]]
"""Chunks [start, end) of each part."""


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, _, high = statistics.quantiles(values, n=4)
    return {
        "median": round(statistics.median(values), 3),
        "quartiles": [round(low, 3), round(high, 3)],  # type: ignore[dict-item]
        "extremes": [round(min(values), 3), round(max(values), 3)],  # type: ignore[dict-item]
    }


def timed(work: Callable[[], object]) -> float:
    """Milliseconds that it takes, what a GPU has been asked included."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


class PeakMemory:
    """The most memory this process held at once beyond what it held before, in bytes, looked at each millisecond."""

    def __enter__(self) -> PeakMemory:
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.extra_bytes = self.peak - self._before


# ---- the step -------------------------------------------------------------------------------------------------------


def gpt(config: ModelConfig) -> GPT:
    """The model; what its parameters hold does not matter here."""
    torch.manual_seed(0)
    return GPT(config)


def manifest(config: ModelConfig, **changes: Any) -> Manifest:
    """With the default treatment of each kind, but for the number of coefficients, and DeMo's steps of signs."""
    treatments = {
        kind: msgspec.structs.replace(getattr(OptimizerConfig(), kind), topk=TOPK, reply_topk=TOPK)
        for kind in ("matrix", "embedding", "head", "vector")
    }
    treatments["matrix"] = msgspec.structs.replace(treatments["matrix"], direction="sign")
    return Manifest(name="bench", nonce="0" * 32, model=config, optimizer=OptimizerConfig(**treatments), **changes)


def encoded(optimizer: DeMo, pending: Pending, ranges: Ranges) -> tuple[bytes, ...]:
    """A group of one's contribution, whose parts it will reduce itself."""
    payloads = optimizer.payloads(pending, ranges)
    for chunks, payload in zip(ranges, payloads, strict=True):
        sent = pending.sent.cut(*chunks)
        decoded.wrote_contribution(payload, optimizer.codec, sent)
    return payloads


def reduced(optimizer: DeMo, chunks: tuple[int, int], payload: bytes) -> bytes:
    """The reply to one contribution of chunks [start, end)."""
    return reduce_part([(0, 1, payload)], optimizer.codec, *chunks, 1)


def replies_of(optimizer: DeMo, ranges: Ranges, replies: Iterable[bytes]) -> list[PartReply]:
    """What they hold."""
    return [
        (start, end, decoded.reply(data, optimizer.codec, start, end, 1))
        for (start, end), data in zip(ranges, replies, strict=True)
    ]


def phases(optimizer: DeMo, of: dict[str, list[float]]) -> float:
    """One step, each phase timed; milliseconds of all."""
    held: dict[str, Any] = {}
    ranges = chain.cut(0, optimizer.layout.chunks, chain.PARTS_PER_REDUCER_MAX)

    def phase(name: str, work: Callable[[], Any]) -> float:
        of.setdefault(name, []).append(timed(lambda: held.__setitem__(name, work())))
        return of[name][-1]

    taken = phase("accumulate_and_select", optimizer.accumulate_and_select)
    pending: Pending = held["accumulate_and_select"]
    taken += phase("encode", lambda: encoded(optimizer, pending, ranges))
    # As many at once as there are parts, as a peer does it.
    taken += phase("reduce", lambda: list(REDUCERS.map(functools.partial(reduced, optimizer), ranges, held["encode"])))
    taken += phase("decode", lambda: replies_of(optimizer, ranges, held["reduce"]))
    taken += phase("apply", lambda: optimizer.apply(held["decode"]))
    return taken + phase("settle", lambda: optimizer.settle(pending, held["decode"], 0))


def gradient_sets(model: GPT) -> list[list[torch.Tensor]]:
    """Normal random gradients for all parameters."""
    return [[torch.randn_like(parameter) for parameter in model.parameters()] for _ in range(GRADIENTS)]


def step_figures() -> dict[str, Any]:
    """Ours beside the others, turn by turn."""
    note("optimizer step: warming up")
    models = [gpt(STEP_MODEL) for _ in range(7)]
    ours, lone = (build_optimizer(model, manifest(STEP_MODEL)) for model in models[:2])
    of_a_new_run = build_optimizer(models[6], Manifest(name="bench", nonce="0" * 32, model=STEP_MODEL))
    lists: list[list[torch.Tensor]] = [list(model.parameters()) for model in models]
    by_phase: dict[str, list[float]] = {}
    steps: dict[str, Callable[[], object]] = {
        "lone": lone.step,
        "lone_of_a_new_run": of_a_new_run.step,
        "straightforward": StraightforwardDeMo(lists[2], LEARNING_RATE, ours.beta, TOPK).step,
        "straightforward_tuned": StraightforwardDeMo(lists[3], LEARNING_RATE, ours.beta, TOPK, tuned=True).step,
        "adamw_foreach": torch.optim.AdamW(lists[4], LEARNING_RATE, foreach=True).step,
        "adamw_fused": torch.optim.AdamW(lists[5], LEARNING_RATE, fused=True).step,
    }
    contenders: dict[str, Callable[[], float]] = {"ours": lambda: phases(ours, by_phase)} | {
        name: functools.partial(timed, step) for name, step in steps.items()
    }
    sets = gradient_sets(models[0])
    milliseconds: dict[str, list[float]] = {name: [] for name in contenders}
    began, turn = time.monotonic(), 0
    while turn < WARM_UP + TURNS_MIN or time.monotonic() - began < STEP_SECONDS:
        for parameters in lists:
            for parameter, gradient in zip(parameters, sets[turn % GRADIENTS], strict=True):
                parameter.grad = gradient
        if turn == WARM_UP:
            for values in (*milliseconds.values(), *by_phase.values()):
                values.clear()
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            milliseconds[name].append(contenders[name]())
        turn += 1
        if turn % 10 == WARM_UP:
            note(f"optimizer step: {turn - WARM_UP} turns, {time.monotonic() - began:.0f} s")
    return {
        **ratios(milliseconds),
        "step": step_table(ours, lists[0], milliseconds, by_phase),
    }


def memory_figures() -> dict[str, int]:
    """What an optimizer's first step takes beyond parameters, gradients, momentum and the directions' state; before
    anything else, as memory that something has given up is not asked for again."""
    note("memory of a step")
    make_ready(torch.device("cpu"))
    model = gpt(STEP_MODEL)
    optimizer = build_optimizer(model, manifest(STEP_MODEL))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.momentum.zero_()  # so that its pages are there
    state_bytes = 0
    for tensor in optimizer.replicated_state().values():
        tensor.add_(0)
        state_bytes += tensor.nbytes
    with PeakMemory() as peak:
        optimizer.step()
    # The directions' state is there twice, the second time from the first step on.
    return {
        "step_peak_extra_bytes": peak.extra_bytes - state_bytes,
        "momentum_bytes": optimizer.momentum.nbytes,
        "directions_state_bytes": 2 * state_bytes,
    }


def ratios(milliseconds: dict[str, list[float]]) -> dict[str, Any]:
    """Of times in the same turn: medians, and below `spread` more of them."""
    of: dict[str, list[float]] = {}
    for ending, one in (("", "ours"), ("_lone", "lone")):
        mine = milliseconds[one]
        for other in ("straightforward", "straightforward_tuned"):
            pairs = zip(milliseconds[other], mine, strict=True)
            of[f"speedup_vs_{other}{ending}"] = [theirs / ours for theirs, ours in pairs]
        for other in ("adamw_foreach", "adamw_fused"):
            pairs = zip(milliseconds[other], mine, strict=True)
            of[f"time_vs_{other}{ending}"] = [ours / theirs for theirs, ours in pairs]
    medians = {name: round(statistics.median(values), 3) for name, values in of.items()}
    return {**medians, "spread": {name: spread(values) for name, values in of.items()}}


def step_table(
    optimizer: DeMo,
    parameters: list[torch.Tensor],
    milliseconds: dict[str, list[float]],
    by_phase: dict[str, list[float]],
) -> dict[str, Any]:
    """Milliseconds of all, phases of ours, and how near they come to what the machine can do."""
    count = sum(parameter.numel() for parameter in parameters)
    medians = {name: statistics.median(taken) for name, taken in (milliseconds | by_phase).items()}
    bandwidth = copy_bytes_per_second(parameters[0].device)
    # What has to move at least: gradient in, momentum in and out, parameters in and out.
    floor_bytes = 4 * (count + 2 * optimizer.momentum.numel() + 2 * count)
    return {
        "parameters": count,
        "chunks": optimizer.layout.chunks,
        "turns": len(milliseconds["ours"]),
        "threads": torch.get_num_threads(),
        "milliseconds": {name: spread(taken) for name, taken in milliseconds.items()},
        "parameters_per_second": {name: round(1000 * count / medians[name]) for name in milliseconds},
        "phases_ms": {name: round(medians[name], 2) for name in by_phase},
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(floor_bytes / bandwidth / (medians["lone"] / 1000), 3),
    }


def copy_bytes_per_second(device: torch.device, size: int = 64 * 1024 * 1024) -> float:
    """Bytes read and written by a plain copy, the best of a few."""
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * size / (min(timed(lambda: target.copy_(source)) for _ in range(5)) / 1000)


# ---- bits -----------------------------------------------------------------------------------------------------------


def part_ranges(chunks: int) -> Iterator[tuple[int, int]]:
    """Equal parts, one a reducer."""
    edges = np.linspace(0, chunks, PARTS + 1).astype(int).tolist()
    return itertools.pairwise(edges)


def message_bytes(payload: bytes, part: int) -> int:
    """Bytes of the frames that carry a contribution."""
    traffic, digest = Traffic(), bytes(range(32))
    tip = Tip(100_000, digest, 10_000_000)
    row = Row(weight=64, sequences_per_kilosecond=20_000, uplink_kbit=10_000)
    traffic.message(ContributionHeader(digest, 100_001, digest, part, row, bytes(64), 99_968, digest, tip))
    for _ in traffic.blob(payload):
        pass
    return traffic.sent


def codec_figures() -> dict[str, Any]:
    """Bits a coefficient and speed of the codec, with 1 and 2 bits a value."""
    out: dict[str, Any] = {"index_entropy_bits": round(index_entropy_bits(), 3)}
    model = gpt(CODEC_MODEL)
    for gradient, parameter in zip(gradient_sets(model)[0], model.parameters(), strict=True):
        parameter.grad = gradient
    for bits in (1, 2):
        note(f"codec: {bits} bits a value")
        optimizer = build_optimizer(model, manifest(CODEC_MODEL))
        optimizer.codec = dataclasses.replace(optimizer.codec, value_bits=bits)
        figures = contribution_figures(optimizer, optimizer.accumulate_and_select())
        out[f"bits_per_coefficient_{bits}bit"] = round(8 * figures["message_bytes"] / figures["coefficients"], 3)
        out[f"codec_{bits}bit"] = figures
    return out


def contribution_figures(optimizer: DeMo, pending: Pending) -> dict[str, Any]:
    """What these contributions weigh, a part each, and how long one of all chunks takes."""
    codec, chunks = optimizer.codec, optimizer.codec.chunks
    count = len(pending.sent.index)
    by_section: Counter[str] = Counter()
    message_total, payload_total = 0, 0
    for number, (start, end) in enumerate(part_ranges(chunks)):
        (payload,) = optimizer.payloads(pending, [(start, end)])
        payload_total += len(payload)
        message_total += message_bytes(payload, number)
        by_section.update(wire.section_bits(pending.sent.cut(start, end), codec))
    by_section["messages"] = 8 * (message_total - payload_total)
    (whole,) = optimizer.payloads(pending, [(0, chunks)])
    encode = statistics.median(timed(lambda: optimizer.payloads(pending, [(0, chunks)])) for _ in range(9))
    decode = statistics.median(timed(lambda: wire.decode_contribution(whole, codec, 0, chunks)) for _ in range(9))
    return {
        "bits_per_coefficient_by_section": {name: round(value / count, 4) for name, value in by_section.items()},
        "coefficients": count,
        "parts": PARTS,
        "payload_bytes": payload_total,
        "message_bytes": message_total,
        "encode_ms": round(encode, 2),
        "decode_ms": round(decode, 2),
        "encode_mb_per_second": round(len(whole) / encode / 1000, 1),
        "decode_mb_per_second": round(len(whole) / decode / 1000, 1),
    }


def index_entropy_bits() -> float:
    """Bits an index of TOPK among 4096 takes at least, where all choices are equally likely."""
    entries = SIDE * SIDE
    choices = math.lgamma(entries + 1) - math.lgamma(TOPK + 1) - math.lgamma(entries - TOPK + 1)
    return choices / math.log(2) / TOPK


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def cuda_figures(model: Mapping[str, int] = GPU_MODEL) -> dict[str, Any] | None:
    """The step of a model on the device, with its replies at hand; default: one of a billion parameters."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in gpu_shapes(model)]
    note(f"{sum(p.numel() for p in parameters):,} parameters on {torch.cuda.get_device_name(device)}")
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    bandwidth = copy_bytes_per_second(device)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
        "step_of": list(ON_DEVICE),
    }
    adamw = torch.optim.AdamW(parameters, LEARNING_RATE, fused=True)
    found["adamw_fused_ms"] = spread([timed(adamw.step) for _ in range(GPU_TURNS)][1:])
    del adamw
    signs = functools.partial(DeMo, parameters, LEARNING_RATE, beta=0.95, topk=TOPK, reply_topk=TOPK)
    of_a_new_run = functools.partial(DeMo, new_run_groups(parameters), LEARNING_RATE, beta=0.95)
    for name, make in (("signs", signs), ("of_a_new_run", of_a_new_run)):
        torch.cuda.empty_cache()
        note(name)
        found[name] = cuda_step(make(), bandwidth)
    return found


def cuda_step(optimizer: DeMo, bandwidth: float) -> dict[str, Any]:
    """Its phases, and what those on the device take together."""
    of: dict[str, list[float]] = {}
    for turn in range(GPU_TURNS):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        taken: dict[str, list[float]] = {}
        phases(optimizer, taken)
        if turn > 1:
            for name, values in taken.items():
                of.setdefault(name, []).extend(values)
        note(f"turn {turn}: { ({name: round(values[0], 1) for name, values in taken.items()}) }")
    step_ms = sum(statistics.median(of[name]) for name in ON_DEVICE)
    # Gradient in, momentum in and out, parameters in and out.
    floor_bytes = 4 * 5 * optimizer.momentum.numel()
    return {
        "step_ms": round(step_ms, 2),
        "share_of_bandwidth": round(floor_bytes / bandwidth / (step_ms / 1000), 3),
        "phases_ms": {name: spread(values) for name, values in of.items()},
        "step_peak_extra_bytes": torch.cuda.max_memory_allocated() - held,
    }


def new_run_groups(parameters: Sequence[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """By kind, each with the treatment of the default manifest; the first two are embedding and head."""
    by_kind = {"matrix": [p for p in parameters[2:] if p.ndim > 1], "vector": [p for p in parameters if p.ndim < 2]}
    by_kind |= {"embedding": [parameters[0]], "head": [parameters[1]]}
    return [
        {"params": those, **msgspec.to_builtins(getattr(OptimizerConfig(), kind))} for kind, those in by_kind.items()
    ]


def gpu_shapes(model: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Parameters of a GPT, which may be larger than what a manifest allows."""
    width = model["embedding"]
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    ends = [(model["vocabulary"], width)] * 2
    return [*ends, *(shape for _ in range(model["layers"]) for shape in block)]


def main() -> int:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result there too")
    options = parser.parse_args()
    watch = Watch()
    figures = {"memory": memory_figures(), **step_figures(), **codec_figures(), "cuda": cuda_figures()}
    finish(options.out, {**machine(), **figures, **watch.figures()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
