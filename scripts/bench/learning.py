"""How well each strategy learns for the bytes it sends: held-out bits per byte, beside AdamW and Muon without a
network.

    python scripts/bench/learning.py --jobs 2 --out docs/results/learning.json --picture docs/pictures/learning.png

Each run trains a GPT of --layers and --embedding on --tokens tokens of the embedded corpus, or of --corpus botocore:
what that package documents, 31 MB (pip install --no-deps botocore==1.44.5), with the same tokenizer. Members are those
of `simulation/group.py`: the product's local computing, momentum, codec, reducing and settling in rounds in which
nothing goes wrong. All runs read as many sequences. A round is BATCH of them, of all members together, or ROUND of a
method with inner steps, of which a member takes one with each of its sequences. Baselines take torch's optimizers'
steps, each over a BATCH of the same sequences.

Every method is tried with five learning rates on the first seed, by eight members who share all text; the best goes on
to the other seeds, to other numbers of members (--peers), to texts of their own (--private) and to the other corpus. A
method is a run.toml's tables on top of its strategy's defaults (METHODS). Runs that are in --out are kept, so it goes
on where it was stopped. Bits are those of payloads, averaged over all rounds, one direction each, for every inner step
of a parameter; where a member takes none, for every round.

A run of 0.8M parameters and 3M tokens takes four to eight minutes of a core. Progress on stderr, one JSON object last.
"""

from __future__ import annotations

import argparse
import gzip
import html
import importlib.util
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from lab.report import note, pyplot, read, save, write
from numpy.typing import NDArray

from p2ptrain.config import strategies
from p2ptrain.config.manifest import Manifest
from p2ptrain.data.assignment import sequence_offsets
from p2ptrain.data.corpus import Corpus, load_embedded
from p2ptrain.data.tokenizer import cached_tokens
from p2ptrain.models.gpt import GPT, kind_of
from p2ptrain.models.init import initialise
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.simulation.group import Group
from p2ptrain.training.evaluation import bits_per_byte

Toml = dict[str, Any]

BATCH = 64
"""Sequences of a step, of all members together."""
ROUND = 128
"""Sequences of a round of inner steps, of all members together: 16 of each of eight."""
CONTEXT = 128
WARM_UP_SHARE = 0.03
"""Of all rounds; eleven of the 366 steps of a run."""
CURVE_POINTS = 8
CURVE_TOKENS = 16_384
BASELINES = ("adamw", "muon")
EMBEDDED = "state-of-the-union"
SIZE = ("tokens", "layers", "embedding")
"""What runs that are compared have in common, beside who trains on what."""
TUNED: Toml = {"peers": 8, "private": False, "seed": 1, "corpus": EMBEDDED}
"""The runs that learning rates are tried in."""
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "muon": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
}
INNER_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
STEP_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def _inner(strategy: str, **optimizer: Any) -> Toml:
    return {"optimizer": {"strategy": strategy, **optimizer}}


SIGNS: Toml = {
    "optimizer": {
        "matrix": {"direction": "sign", "learning_rate_scale": 1.0},
        **{kind: {"learning_rate_scale": 16.0} for kind in ("embedding", "head", "vector")},
    }
}
"""DeMo as in its paper, but for embedding, head and gains."""


@dataclass(frozen=True, slots=True)
class Method:
    """What is compared."""

    table: Toml
    """Of a run.toml, where not its strategy's default; of a baseline, nothing."""
    round: int = BATCH
    """Sequences of a round, of all members together."""
    inner: bool = False
    """Members take an inner step with each sequence."""
    rates: tuple[float, ...] = STEP_RATES
    default: bool = False
    """What a run.toml that says nothing gets; a row is only where the learning rate is, too."""


METHODS: dict[str, Method] = {
    "adamw": Method({}, rates=RATES["adamw"]),
    "muon": Method({}, rates=RATES["muon"]),
    "demo": Method({}, default=True),
    "demo-signs": Method(SIGNS, rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
    "dense": Method(_inner("dense"), rates=INNER_RATES),
    "local_demo": Method(_inner("local_demo"), ROUND, True),
    "sparse_diloco": Method(_inner("sparse_diloco"), ROUND, True, INNER_RATES),
    "diloco": Method(_inner("diloco"), ROUND, True, (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
}


def _local_demo(inner_steps: int, topk: int, reply_topk: int, **of_matrices: Any) -> Method:
    """`local_demo` of eight members with other rounds."""
    kept = {"topk": topk, "reply_topk": reply_topk}
    kinds = {kind: kept for kind in ("embedding", "head", "vector")} | {"matrix": kept | of_matrices}
    return Method(_inner("local_demo", **kinds), 8 * inner_steps, True)


ABLATIONS: dict[str, Method] = {
    "local_demo-1": _local_demo(1, 2, 2),
    "local_demo-5": _local_demo(5, 9, 8),
    "local_demo-32": _local_demo(32, 60, 50),
    "local_demo-untransformed": _local_demo(16, 30, 25, transform="none"),
}
"""Only where --methods names them: about as many bits for an inner step, in shorter and longer rounds, and matrices as
they are."""
KNOWN = METHODS | ABLATIONS


@dataclass(frozen=True, slots=True)
class Setting:
    """One run."""

    method: str
    peers: int
    seed: int
    learning_rate: float
    tokens: int
    layers: int
    embedding: int
    private: bool
    """Each member reads a slice of the text of its own, in the order of years, instead of all of it."""
    corpus: str = EMBEDDED


@dataclass(frozen=True, slots=True)
class Text:
    """A corpus as tokens."""

    train: NDArray[np.uint16]
    heldout: NDArray[np.uint16]
    heldout_bytes: int

    @classmethod
    def load(cls, name: str) -> Text:
        """A corpus by name; its tokens are kept in the temporary folder."""
        folder = Path(tempfile.gettempdir()) / "p2ptrain-bench-learning"
        folder.mkdir(parents=True, exist_ok=True)
        corpus = CORPORA[name]()
        return cls(cached_tokens(corpus.train, folder), cached_tokens(corpus.heldout, folder), len(corpus.heldout))

    def of_members(self, setting: Setting) -> list[NDArray[np.uint16]]:
        """What each member reads."""
        if not setting.private:
            return [self.train] * setting.peers
        return list(np.array_split(self.train, setting.peers))

    def scored(self, model: GPT, max_tokens: int | None = None) -> float:
        """Held-out bits per byte."""
        return bits_per_byte(model, self.heldout, self.heldout_bytes, max_tokens=max_tokens)


def botocore_documentation() -> Corpus:
    """What botocore says of Amazon's services, a paragraph each, in the order of their names; nothing twice."""
    found = importlib.util.find_spec("botocore")
    if found is None or found.origin is None:
        raise SystemExit("there is no botocore here; install it with: pip install --no-deps botocore==1.44.5")
    paragraphs: dict[str, None] = {}

    def collect(node: object) -> None:
        if isinstance(node, dict):
            text = node.get("documentation")
            if isinstance(text, str):
                paragraphs[" ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())] = None
            for child in node.values():
                collect(child)
        elif isinstance(node, list):
            for child in node:
                collect(child)

    for path in sorted((Path(found.origin).parent / "data").rglob("service-2.json.gz")):
        collect(json.loads(gzip.decompress(path.read_bytes())))
    whole = ("\n\n".join(paragraphs).strip() + "\n\n").encode()
    # The last 2 % are held out, from a paragraph on.
    cut = whole.rindex(b"\n\n", 0, int(len(whole) * 0.98)) + 2
    return Corpus("botocore", "Apache-2.0", whole[:cut], whole[cut:])


CORPORA: dict[str, Callable[[], Corpus]] = {
    EMBEDDED: load_embedded,
    "botocore": botocore_documentation,
}


def rounds_of(setting: Setting) -> int:
    """Of the whole run."""
    return max(1, round(setting.tokens / (KNOWN[setting.method].round * CONTEXT)))


def inner_steps_of(setting: Setting) -> int:
    """Of a member and round."""
    method = KNOWN[setting.method]
    return method.round // setting.peers if method.inner else 1


def manifest_of(setting: Setting) -> Manifest:
    """The run.toml of a method, with everything that is the same for all."""
    method = KNOWN[setting.method]
    rounds, each = rounds_of(setting), method.round // setting.peers
    common: Toml = {
        "name": "bench",
        "nonce": f"{setting.seed:032x}",
        "model": {"layers": setting.layers, "heads": setting.embedding // 32, "embedding": setting.embedding},
        "optimizer": {
            "learning_rate": setting.learning_rate,
            "total_rounds": rounds,
            "warmup_rounds": max(1, round(WARM_UP_SHARE * rounds)),
            "inner_batch": 1,
        },
        "round": {
            "pace": "fixed",
            "sequences_per_peer": each,
            "micro_batch": 1 if method.inner else each,
            "robust": "mean",
        },
    }
    common["model"]["context"] = CONTEXT
    table = strategies.merged(common, method.table)
    return msgspec.convert(strategies.completed(table), Manifest)


def default_rate(setting: Setting) -> float:
    """What a run.toml that says nothing of it gets, for a model of this width."""
    table = strategies.completed({"name": "a", "nonce": "0" * 32, "model": {"embedding": setting.embedding}})
    return msgspec.convert(table, Manifest).optimizer.learning_rate


def members_of(setting: Setting) -> list[bytes]:
    """Names in place of peer ids."""
    return [f"member {number}".encode() for number in range(setting.peers)]


class Baseline:
    """One of torch's optimizers over the sequences that all members read."""

    def __init__(self, setting: Setting, text: Text, device: str) -> None:
        self.manifest, self._members, self._tokens = manifest_of(setting), members_of(setting), text.of_members(setting)
        self.model, self._device = GPT(self.manifest.model).to(device), device
        initialise(self.model, bytes.fromhex(self.manifest.nonce))
        self.rounds = 0
        named = [(kind_of(name, p) == "matrix", p) for name, p in self.model.named_parameters()]
        hidden, ends = ([p for is_matrix, p in named if is_matrix == wanted] for wanted in (True, False))
        betas, rate = (0.9, 0.95), setting.learning_rate
        self._optimizers: list[torch.optim.Optimizer]
        if setting.method == "adamw":
            self._optimizers = [torch.optim.AdamW([*hidden, *ends], rate, betas=betas, weight_decay=0.0)]
        else:
            # The learning rates of its two halves in the ratio that Muon's authors use for small models.
            self._optimizers = [
                torch.optim.Muon(hidden, rate, weight_decay=0.0),
                torch.optim.AdamW(ends, rate / 4, betas=betas, weight_decay=0.0),
            ]
        self._peaks = [[group["lr"] for group in one.param_groups] for one in self._optimizers]

    def play(self) -> float:
        """One step; nothing is sent."""
        config, count = self.manifest.optimizer, self.manifest.round.sequences_per_peer
        nonce = bytes.fromhex(self.manifest.nonce)
        batch = np.stack(
            [
                tokens[offset : offset + CONTEXT + 1]
                for member, tokens in zip(self._members, self._tokens, strict=True)
                for offset in sequence_offsets(nonce, member, self.rounds * count, count, len(tokens), CONTEXT)
            ]
        ).astype(np.int64)
        self.rounds += 1
        self.model.loss(torch.from_numpy(batch).to(self._device)).backward()
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = learning_rate(
                    self.rounds,
                    peak=peak,
                    warmup_rounds=config.warmup_rounds,
                    total_rounds=config.total_rounds,
                    final_fraction=config.final_fraction,
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return 0.0


class Strategy:
    """A group of members that use one of ours."""

    def __init__(self, setting: Setting, text: Text, device: str) -> None:
        self._members = members_of(setting)
        texts = dict(zip(self._members, text.of_members(setting), strict=True))
        self._group = Group(manifest_of(setting), texts.__getitem__, device)
        self._parts = self._group.equal_parts(setting.peers)
        self.model = self._group.model

    def play(self) -> float:
        """One round; payload bytes that a member has sent, on average, and received."""
        return self._group.play(self._members, self._parts).sent_bytes


def train(setting: Setting, device: str = "cpu") -> Toml:
    """One run: its row."""
    torch.set_num_threads(1)
    text, manifest, method = Text.load(setting.corpus), manifest_of(setting), KNOWN[setting.method]
    baseline = setting.method in BASELINES
    trained = Baseline(setting, text, device) if baseline else Strategy(setting, text, device)
    rounds, inner_steps, sent = rounds_of(setting), inner_steps_of(setting), 0.0
    every = max(1, rounds // CURVE_POINTS)
    curve: list[tuple[int, float]] = []
    began = time.process_time()
    for number in range(1, rounds + 1):
        sent += trained.play()
        if number % every == 0 and number < rounds:
            curve.append((number, round(text.scored(trained.model, CURVE_TOKENS), 4)))
            note(f"{label(setting)}: round {number}: {curve[-1][1]:.3f} bits per byte")
            if not math.isfinite(curve[-1][1]):
                break
    bits = text.scored(trained.model)
    parameters = manifest.model.parameters
    per_parameter = None if baseline else round(8 * sent / parameters / rounds / inner_steps, 5)
    return {
        **asdict(setting),
        "default": method.default and setting.learning_rate == default_rate(setting),
        "parameters": parameters,
        "inner_steps": inner_steps,
        "rounds": rounds,
        "bits_per_byte": round(bits, 4) if math.isfinite(bits) else None,
        "bits_per_parameter_sent": per_parameter,
        "bits_per_parameter_received": per_parameter,
        "curve_bits_per_byte": curve,
        "cpu_seconds": round(time.process_time() - began),
    }


def label(setting: Setting) -> str:
    """For people."""
    return (
        f"{setting.method} on {setting.corpus}, {setting.peers} peers, seed {setting.seed}, "
        f"rate {setting.learning_rate:g}"
    )


# ---- which runs ---------------------------------------------------------------------------------------------------


def setting_of(row: Toml) -> Setting:
    """Of a row."""
    return Setting(**{name: row[name] for name in Setting.__slots__})


def best_rate(rows: Sequence[Toml], one: Setting) -> float | None:
    """The learning rate that did best at this method and size where it was tuned."""
    wanted = {**TUNED, **{name: getattr(one, name) for name in ("method", *SIZE)}}
    alike = [
        row
        for row in rows
        if row["bits_per_byte"] is not None and all(row[name] == value for name, value in wanted.items())
    ]
    return min(alike, key=lambda row: row["bits_per_byte"])["learning_rate"] if alike else None


def read_rows(path: Path) -> list[Toml]:
    """Of earlier runs, if there are any."""
    rows: list[Toml] = read(path) or []
    return rows


def wanted(options: argparse.Namespace, rows: Sequence[Toml]) -> Iterator[Setting]:
    """Runs due now: all learning rates on the first seed; once they are there, the best one on the others."""
    rows = [*rows, *read_rows(options.tuned)]
    done = {setting_of(row) for row in rows}
    for name in options.methods:
        size: Toml = {key: getattr(options, key) for key in SIZE}
        tuning = [
            Setting(method=name, learning_rate=rate, **TUNED, **size) for rate in options.rates or KNOWN[name].rates
        ]
        missing = [setting for setting in tuning if setting not in done]
        yield from missing
        rate = None if missing else best_rate(rows, tuning[0])
        if rate is not None:
            seeds = range(1, options.seeds + 1)
            there = {"peers": options.peers, "private": options.private, "corpus": options.corpus}
            others = (Setting(method=name, seed=seed, learning_rate=rate, **there, **size) for seed in seeds)
            yield from (setting for setting in others if setting not in done)


def run_all(options: argparse.Namespace) -> list[Toml]:
    """Train what is missing, a few runs at once; rows are written as they come."""
    rows = read_rows(options.out)
    under_way: dict[Future[Toml], Setting] = {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        while True:
            for setting in wanted(options, rows):
                if len(under_way) < options.jobs and setting not in under_way.values():
                    under_way[pool.submit(train, setting, options.device)] = setting
            if not under_way:
                return rows
            for run in wait(under_way, return_when=FIRST_COMPLETED).done:
                del under_way[run]
                row = run.result()
                rows.append(row)
                note(f"{label(setting_of(row))}: {row['bits_per_byte']}")
                write(options.out, rows)


def table(rows: Sequence[Toml]) -> list[Toml]:
    """The best learning rate of each method, over all seeds, beside AdamW at as many peers and the same size."""
    groups: dict[tuple[Any, ...], list[Toml]] = {}
    for row in rows:
        if row["learning_rate"] == best_rate(rows, setting_of(row)) and row["bits_per_byte"] is not None:
            key = tuple(row[name] for name in ("method", "peers", "private", "corpus", *SIZE))
            groups.setdefault(key, []).append(row)
    found = []
    for key, alike in groups.items():
        bits = [row["bits_per_byte"] for row in alike]
        beside = groups.get(("adamw", *key[1:]))
        adamw = statistics.mean(row["bits_per_byte"] for row in beside) if beside else None
        found.append(
            {
                "method": key[0],
                "peers": key[1],
                "private": key[2],
                "corpus": key[3],
                "parameters": alike[0]["parameters"],
                "learning_rate": alike[0]["learning_rate"],
                "seeds": len(bits),
                "bits_per_byte": round(statistics.mean(bits), 4),
                "spread": round(max(bits) - min(bits), 4),
                "over_adamw": round(statistics.mean(bits) / adamw - 1, 4) if adamw else None,
                "bits_per_parameter_sent": alike[0]["bits_per_parameter_sent"],
                "bits_per_parameter_received": alike[0]["bits_per_parameter_received"],
                "bits_per_parameter_of_run": _bits_of_run(alike[0]),
            }
        )
    return sorted(found, key=lambda one: (one["parameters"], one["peers"], one["bits_per_byte"]))


def _bits_of_run(row: Toml) -> float | None:
    """Sent and received for a parameter, in all rounds."""
    if row["bits_per_parameter_sent"] is None:
        return None
    each = row["bits_per_parameter_sent"] + row["bits_per_parameter_received"]
    return round(each * row["rounds"] * row["inner_steps"], 1)


def draw(found: Sequence[Toml], path: Path) -> None:
    """Loss against bytes."""
    figure, axes = pyplot().subplots(figsize=(8, 5))
    for one in found:
        bits = one["bits_per_parameter_of_run"]
        if bits is None:
            axes.axhline(one["bits_per_byte"], linestyle="--", color="grey", linewidth=0.8)
            axes.text(1, one["bits_per_byte"], f" {one['method']}", fontsize=8, color="grey", va="bottom", ha="right",
                      transform=axes.get_yaxis_transform())  # fmt: skip
            continue
        axes.errorbar(bits, one["bits_per_byte"], yerr=one["spread"] / 2, fmt="o", capsize=3)
        axes.annotate(
            one["method"], (bits, one["bits_per_byte"]), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    axes.set(
        xscale="log",
        xlim=(10, 10_000),
        xlabel="bits sent and received for a parameter, in the whole run",
        ylabel="bits per byte of held-out text",
        title="Loss against bytes, the same tokens for all",
    )
    axes.grid(alpha=0.3)
    save(figure, path)


def main() -> int:
    """The bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/learning.json"), help="rows; %(default)s")
    tuned = "rows that say, beside those in --out, which learning rates did best"
    parser.add_argument("--tuned", type=Path, default=Path(os.devnull), help=tuned)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS), help=", ".join(KNOWN))
    parser.add_argument("--peers", type=int, default=8, choices=(1, 2, 4, 8, 16), help="members; %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="%(default)s")
    parser.add_argument("--layers", type=int, default=6, help="%(default)s")
    parser.add_argument("--embedding", type=int, default=64, help="%(default)s")
    parser.add_argument("--private", action="store_true", help="each member reads a slice of the text of its own")
    parser.add_argument("--corpus", default=EMBEDDED, choices=tuple(CORPORA), help="%(default)s")
    parser.add_argument("--device", default="cpu", help="where all runs compute; %(default)s")
    rates = "learning rates to try, by commas; default: each method's, which suit a width of 64"
    parser.add_argument("--rates", type=lambda text: tuple(map(float, text.split(","))), help=rates)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each; %(default)s")
    options = parser.parse_args()
    unknown = [name for name in options.methods if name not in KNOWN]
    if unknown:
        parser.error(f"no method {unknown[0]}; there are {', '.join(KNOWN)}")
    rows = run_all(options)
    if options.picture is not None:
        same = ("peers", "private", "corpus", *SIZE)
        draw(table([row for row in rows if all(row[name] == getattr(options, name) for name in same)]), options.picture)
    print(json.dumps(table([*rows, *read_rows(options.tuned)]), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
