"""Replays a journal of `lone.Lone`, as a program: in a process, or an interpreter, of its own."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from lone import MANIFEST, RUN_ID

from p2ptrain.averaging import chain
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify
from p2ptrain.training.replica import Replica


def replay(folder: Path, device: str, *, compiled: bool) -> str:
    """The hash of the parameters after all rounds in a journal."""
    replica = Replica(MANIFEST, RUN_ID, torch.device(device))
    if compiled:
        # The whole step, batch by batch: inverse transform, direction, decay, update.
        replica.optimizer._step_batch = torch.compile(replica.optimizer._step_batch)  # type: ignore[method-assign]
    journal = Journal(folder, RUN_ID, verify)
    for number in range(journal.first, journal.last + 1):
        sealed = journal.read(number)
        shape = chain.shape_of(replica.chain, replica.layout.chunks)
        replica.apply(sealed, shape, chain.extend(replica.chain, sealed.id, sealed.seal, replica.layout.chunks))
    return replica.parameters_sha256()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("journal", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sha256 = replay(options.journal, options.device, compiled=options.compiled)
    print(json.dumps({"python": platform.python_version(), "parameters_sha256": sha256}))


if __name__ == "__main__":
    main()
