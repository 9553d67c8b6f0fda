"""One peer of p2ptrain, of hivemind's Optimizer or of torch's DDP, on a GPT whose computing is modelled.

    python scripts/bench/lab/step_peer.py ddp --rank 0 --peers 4 --host 10.0.0.1 --master 10.0.0.1 ...

Started by bench/time_to_loss.py behind lines. Says a JSON line on stdout where it can be joined, one after each step of
the optimizer, when (time.monotonic, which all processes share) and what its line has carried; ends when stdin does.
Each method is arranged as suits it best:

- p2ptrain is the command line's `bootstrap` and `join`; only model and trainer are replaced, the latter by one that
  says when a step was taken.
- DDP computes its sequences at once and sends a bucket of 4 MB as soon as it is complete, while the rest of the
  backward pass goes on; `ddp-fp16` with its compression hook, which halves the bytes.
- hivemind computes a sequence at a time, since peers go on computing until they know that the group has enough;
  matchmaking begins ahead of that, as the Optimizer does by default. Averaging of parameters every few steps, which it
  also does by default, is left out, and so are its delayed modes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lab.lines import DEVICE, counted_here
from lab.report import say
from lab.synthetic_gpt import SyntheticGPT
from torch import Tensor, nn

from p2ptrain.config.manifest import ModelConfig

LEARNING_RATE = 1e-3
BUCKET_MB = 4
PORT = 29500
TIMEOUT_SECONDS = 600.0
MATCHMAKING_SECONDS = 2.0
REQUEST_SECONDS = 1.0
"""Of a follower to a leader; hivemind wants it below the matchmaking time."""
REFRESH_SECONDS = 0.2
"""How often a hivemind peer asks the DHT how far the group is, at most; its default of 0.5 s would add to each step."""
CHUNK_TIMEOUT_SECONDS = 60.0


def say_step(step: int, **what: object) -> None:
    """A step was taken."""
    say(step=step, at=time.monotonic(), line=counted_here(), **what)


def end_with_stdin() -> None:
    """From now on; what is open is for whoever started this to clean up."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class Loss(nn.Module):
    """The loss as the output of `forward`, where DDP looks for it."""

    def __init__(self, model: SyntheticGPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens)


def batch(model: SyntheticGPT, sequences: int) -> Tensor:
    """Tokens; what they are does not matter."""
    return torch.zeros(sequences, model.config.context + 1, dtype=torch.int64)


def run_p2ptrain(options: argparse.Namespace) -> None:
    """Until stdin ends."""
    from lab.peer import run_with

    from p2ptrain.chain import bits
    from p2ptrain.peer.assembly import Make
    from p2ptrain.rounds.events import Apply
    from p2ptrain.training.trainer import Trainer

    class SayingTrainer(Trainer):
        """Says when a step was taken, and how many micro-batches behind it were computed before the step before."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            #: where the replica stood at each micro-batch since the last contribution
            self._stood_at: list[int] = []
            self._stale = 0

        def _micro_batch(self) -> None:
            self._stood_at.append(self.replica.chain.round)
            super()._micro_batch()

        def _contribute(self, start: Any, swarm: Any) -> None:
            self._stale = sum(round < start.key.round - 1 for round in self._stood_at)
            self._stood_at.clear()
            super()._contribute(start, swarm)

        def take(self, message: Any, swarm: Any) -> None:
            super().take(message, swarm)
            if isinstance(message, Apply):
                members = len(message.shape.members)
                seal = message.sealed.seal
                say_step(seal.round, members=members, included=len(bits(seal.included, members)), stale=self._stale)

    seconds = options.compute_seconds / options.sequences
    end_with_stdin()
    run_with(Make(SayingTrainer, functools.partial(SyntheticGPT, seconds_per_sequence=seconds)), options.command)


def run_ddp(options: argparse.Namespace, model: SyntheticGPT, *, half: bool) -> None:
    """Steps until stdin ends."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    end_with_stdin()
    os.environ |= {"MASTER_ADDR": options.master, "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": DEVICE}
    patience = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", rank=options.rank, world_size=options.peers, timeout=patience)
    parallel = DistributedDataParallel(Loss(model), bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
    if half:
        parallel.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    step = 0
    while True:
        parallel(batch(model, options.sequences)).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        say_step(step)


def run_hivemind(options: argparse.Namespace, model: SyntheticGPT) -> None:
    """Steps until stdin ends; before the first ones it waits for a line, since a step for two is of no interest."""
    import hivemind
    from hivemind.optim.grad_averager import GradientAverager

    dht = hivemind.DHT(
        initial_peers=options.join,
        host_maddrs=[f"/ip4/{options.host}/tcp/0"],
        use_relay=False,
        nat_port_map=False,
        auto_nat=False,
        start=True,
    )
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="baseline",
        params=model.parameters(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, LEARNING_RATE, fused=True),
        batch_size_per_step=1,
        target_batch_size=options.peers * options.sequences,
        use_local_updates=False,
        delay_optimizer_step=False,
        delay_grad_averaging=False,
        offload_optimizer=True,
        average_state_every=1_000_000,
        matchmaking_time=MATCHMAKING_SECONDS,
        averaging_timeout=TIMEOUT_SECONDS,
        next_chunk_timeout=CHUNK_TIMEOUT_SECONDS,
        grad_compression=hivemind.compression.Float16Compression(),
        grad_averager_factory=functools.partial(
            GradientAverager, target_group_size=options.peers, request_timeout=REQUEST_SECONDS
        ),
        averager_opts={"request_timeout": REQUEST_SECONDS},
        tracker_opts={"min_refresh_period": REFRESH_SECONDS, "default_refresh_period": REFRESH_SECONDS},
        verbose=True,
    )
    say(join=[str(address) for address in dht.get_visible_maddrs()])
    input()
    # A peer counts once it has reported a sample.
    model.loss(batch(model, 1)).backward()
    optimizer.step()
    while optimizer.tracker.global_progress.num_peers < options.peers:
        time.sleep(REFRESH_SECONDS)
    say(sees=options.peers)
    input()
    end_with_stdin()
    epoch = optimizer.local_epoch
    while True:
        model.loss(batch(model, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.local_epoch > epoch:
            epoch = optimizer.local_epoch
            say_step(epoch)


def main() -> None:
    """Until stdin ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=("p2ptrain", "ddp", "ddp-fp16", "hivemind"))
    parser.add_argument("--model", type=json.loads, required=True, help="the manifest's [model], as JSON")
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True, help="a peer and step")
    parser.add_argument("--compute-seconds", type=float, required=True, help="of all of them")
    parser.add_argument("--host", help="address of this peer")
    parser.add_argument("--rank", type=int, help="DDP")
    parser.add_argument("--master", help="DDP: address of rank 0")
    parser.add_argument("--join", action="append", help="hivemind: where to meet")
    parser.add_argument("--command", nargs=argparse.REMAINDER, help="p2ptrain: its command line; must be last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.method == "p2ptrain":
        run_p2ptrain(options)
        return
    model = SyntheticGPT(ModelConfig(**options.model), options.compute_seconds / options.sequences)
    if options.method == "hivemind":
        run_hivemind(options, model)
    else:
        run_ddp(options, model, half=options.method == "ddp-fp16")


if __name__ == "__main__":
    main()
