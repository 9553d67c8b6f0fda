"""What a loop of one's own costs beside the built-in trainer: a micro-batch of the same model on the same text.

    python scripts/bench/own_loop.py --layers 7 --heads 6 --embedding 384 --repeats 10

Both are timed by turns, by what this process computes, so that others on the machine count for little. What follows a
micro-batch (the contribution, the exchange, the step) is the same code. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from lab.report import machine

from p2ptrain.config.manifest import Manifest, ModelConfig
from p2ptrain.data.assignment import sequence_offsets
from p2ptrain.observe.status import Status
from p2ptrain.state.own_log import OwnLog
from p2ptrain.training.replica import Replica
from p2ptrain.training.standing import Books
from p2ptrain.training.trainer import OwnLoop, Participant, Trainer

BATCHES = 4
"""Micro-batches of a contribution, one after another."""
TEXT_TOKENS = 200_000


def main() -> None:
    """Time both."""
    default = ModelConfig()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=default.layers)
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--embedding", type=int, default=default.embedding)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ModelConfig(layers=options.layers, heads=options.heads, embedding=options.embedding)
    manifest = Manifest(name="bench", nonce="0" * 32, model=model)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, TEXT_TOKENS).astype(np.uint16)
    with tempfile.TemporaryDirectory() as folder:

        def books() -> Books:
            replica = Replica(manifest, bytes(32), torch.device("cpu"))
            return Books(replica, bytes(38), Path(folder), OwnLog(Path(folder)))

        builtin = Trainer(books(), tokens, 3.5, queue.SimpleQueue(), Status())
        own = OwnLoop(books(), queue.SimpleQueue(), Status())
        count, gpt = manifest.round.micro_batch, own.replica.model

        def by_own_loop() -> None:
            read = own.books.sequences_read
            places = sequence_offsets(bytes(16), bytes(38), read, count, len(tokens), model.context)
            batch = np.stack([tokens[place : place + model.context + 1] for place in places]).astype(np.int64)
            loss = gpt.loss(torch.from_numpy(batch))  # type: ignore[operator]
            loss.backward()
            own.handed(count, loss.item())

        took: dict[str, list[float]] = {"builtin": [], "own_loop": []}
        ways: list[tuple[str, Participant, Callable[[], None]]] = [
            ("builtin", builtin, builtin.compute),
            ("own_loop", own, by_own_loop),
        ]
        for number in range(options.repeats + 2):
            for name, of, compute in ways if number % 2 else ways[::-1]:
                began = time.process_time()
                for _ in range(BATCHES):
                    compute()
                took[name].append((time.process_time() - began) / BATCHES)
                of._local.gather()
                of.replica.optimizer.zero_grad(set_to_none=True)
    # The first two of each find caches cold.
    seconds = {name: statistics.median(times[2:]) for name, times in took.items()}
    figures = {
        **machine(),
        "parameters": model.parameters,
        "micro_batch": count,
        "cpu_seconds_per_micro_batch": seconds,
        "own_loop_over_builtin": seconds["own_loop"] / seconds["builtin"],
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
