"""A peer that trains one matrix of 8 MiB, by itself a file of sixteen pieces, until it is told to end.

python tests/swarm/one_matrix.py bootstrap|join RUN_TOML|ADDR --home DIR --host HOST --seed NUMBER
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import p2ptrain

WIDE, HIGH = 1024, 2048


def main() -> None:
    """Take part until the run's end."""
    parser = argparse.ArgumentParser()
    for name in ("command", "where", "--home", "--host"):
        parser.add_argument(name)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = nn.Linear(WIDE, HIGH, bias=False)
    take_part = p2ptrain.bootstrap if options.command == "bootstrap" else p2ptrain.join
    peer = take_part(options.where, model=model, home=options.home, host=options.host)
    with peer:
        print(f"others join at {peer.address}", flush=True)
        while not peer.ended:
            model(torch.randn(2, WIDE)).square().mean().backward()
            peer.optimizer.step(samples=2)


if __name__ == "__main__":
    main()
