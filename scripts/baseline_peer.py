"""One peer of a baseline: hivemind's Optimizer, or torch's DDP over gloo, on a GPT whose computing is modelled.

    python scripts/baseline_peer.py ddp --rank 0 --peers 4 --address 10.0.0.1 --master 10.0.0.1 --compute-seconds 10

Started by bench_time_to_loss.py, in a network namespace for each peer. Prints a JSON line after each step of the
optimizer. hivemind's also print where they can be joined, that they are ready, and that they see all others; after each
of the last two they wait for a line on stdin. Each method is arranged as suits it best:

- DDP computes its four sequences at once and sends a bucket of 4 MB as soon as it is complete, while the rest of the
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
import time
from datetime import timedelta

import torch
from synthetic_gpt import SyntheticGPT
from torch import Tensor, nn

from p2ptrain.config.manifest import ModelConfig

LEARNING_RATE = 1e-3
BUCKET_MB = 4
GLOO_TIMEOUT = timedelta(seconds=600)
MATCHMAKING_SECONDS = 2.0
REQUEST_SECONDS = 1.0
"""Of a follower to a leader; hivemind wants it below the matchmaking time."""
REFRESH_SECONDS = 0.2
"""How often a hivemind peer asks the DHT how far the group is, at most; its default of 0.5 s would add to each step."""
AVERAGING_TIMEOUT_SECONDS = 300.0
CHUNK_TIMEOUT_SECONDS = 60.0


class Loss(nn.Module):
    """The loss as the output of `forward`, where DDP looks for it."""

    def __init__(self, model: SyntheticGPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens)


def say(**what: object) -> None:
    """One JSON line."""
    print(json.dumps({"time": time.time(), **what}), flush=True)


def batch(model: SyntheticGPT, sequences: int) -> Tensor:
    """Tokens; what they are does not matter."""
    return torch.zeros(sequences, model.config.context + 1, dtype=torch.int64)


def run_ddp(options: argparse.Namespace, model: SyntheticGPT, *, half: bool) -> None:
    """Steps without end."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": options.master, "MASTER_PORT": str(options.port)}
    dist.init_process_group("gloo", rank=options.rank, world_size=options.peers, timeout=GLOO_TIMEOUT)
    parallel = DistributedDataParallel(Loss(model), bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
    if half:
        parallel.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    step = 0
    while True:
        began = time.monotonic()
        parallel(batch(model, options.sequences)).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        say(step=step, seconds=time.monotonic() - began)


def run_hivemind(options: argparse.Namespace, model: SyntheticGPT) -> None:
    """Steps without end."""
    import hivemind
    from hivemind.optim.grad_averager import GradientAverager

    dht = hivemind.DHT(
        initial_peers=options.join,
        host_maddrs=[f"/ip4/{options.address}/tcp/0"],
        use_relay=False,
        nat_port_map=False,
        auto_nat=False,
        start=True,
    )
    say(join=[str(address) for address in dht.get_visible_maddrs()])
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
        averaging_timeout=AVERAGING_TIMEOUT_SECONDS,
        next_chunk_timeout=CHUNK_TIMEOUT_SECONDS,
        grad_compression=hivemind.compression.Float16Compression(),
        grad_averager_factory=functools.partial(
            GradientAverager, target_group_size=options.peers, request_timeout=REQUEST_SECONDS
        ),
        tracker_opts={"min_refresh_period": REFRESH_SECONDS, "default_refresh_period": REFRESH_SECONDS},
        verbose=True,
    )
    say(ready=True)
    input()
    # A peer counts once it has reported a sample; until all do, nobody goes on, so that no step is for two.
    model.loss(batch(model, 1)).backward()
    optimizer.step()
    while optimizer.tracker.global_progress.num_peers < options.peers:
        time.sleep(REFRESH_SECONDS)
    say(sees=options.peers)
    input()
    epoch, began, batches = 0, time.monotonic(), 0
    while True:
        model.loss(batch(model, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        batches += 1
        if optimizer.local_epoch > epoch:
            epoch = optimizer.local_epoch
            say(step=epoch, seconds=time.monotonic() - began, batches=batches)
            began, batches = time.monotonic(), 0


def main() -> None:
    """Until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=("ddp", "ddp-fp16", "hivemind"))
    parser.add_argument("--model", type=json.loads, required=True, help="the manifest's [model], as JSON")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--sequences", type=int, default=4, help="a peer and step")
    parser.add_argument("--compute-seconds", type=float, required=True, help="of all of them")
    parser.add_argument("--address", required=True, help="this peer's")
    parser.add_argument("--master", help="DDP: address of rank 0")
    parser.add_argument("--port", type=int, default=29500, help="DDP: of rank 0")
    parser.add_argument("--join", action="append", help="hivemind: where to meet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = SyntheticGPT(ModelConfig(**options.model), options.compute_seconds / options.sequences)
    if options.method == "hivemind":
        run_hivemind(options, model)
    else:
        run_ddp(options, model, half=options.method == "ddp-fp16")


if __name__ == "__main__":
    main()
