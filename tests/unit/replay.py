"""Replays a journal: as a function, and as a program for a process, or an interpreter, of its own."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from lone import MANIFEST, RUN_ID

from p2ptrain import chain
from p2ptrain.config.manifest import Manifest, open_manifest
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify
from p2ptrain.training.replica import Replica


def replay(
    folder: Path, manifest: Manifest, run_id: bytes, *, device: str = "cpu", compiled: bool = False
) -> tuple[Replica, Journal]:
    """The replica after all rounds in a journal, and the journal."""
    replica = Replica(manifest, run_id, torch.device(device))
    if compiled:
        # The whole step, batch by batch: inverse transform, direction, decay, update.
        stepper = replica.optimizer._stepper
        stepper._step_batch = torch.compile(stepper._step_batch)  # type: ignore[method-assign]
    journal = Journal(folder, run_id, verify)
    for number in range(journal.first, journal.last + 1):
        sealed = journal.read(number)
        shape = chain.shape_of(replica.chain, replica.layout.chunks)
        replica.apply(sealed, shape, chain.extend(replica.chain, sealed.id, sealed.seal, replica.layout.chunks))
    return replica, journal


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("journal", type=Path)
    parser.add_argument("--manifest", type=Path, help="signed; default: that of lone.Lone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    manifest, run_id = open_manifest(options.manifest.read_bytes()) if options.manifest else (MANIFEST, RUN_ID)
    replica, _ = replay(options.journal, manifest, run_id, device=options.device, compiled=options.compiled)
    result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "state_id": replica.chain.id.hex(),
        "parameters_sha256": replica.parameters_sha256(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
