"""Train a small convolutional net on made-up pictures, with a loop of one's own, together with others.

    python docs/examples/pictures.py bootstrap run.toml --home a
    python docs/examples/pictures.py join ADDR --home b

Each peer makes pictures of its own. At the end of the run all have the same parameters, to the bit.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import p2ptrain

SIDE = 16
SAMPLES = 32


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy pictures [count, 1, 16, 16] and what each shows: bars lying or standing, a square, a cross."""
    label = torch.randint(0, 4, (count,), generator=generator)
    place = torch.randint(3, SIDE - 3, (count, 2, 1, 1), generator=generator)
    row, column = torch.arange(SIDE).view(1, SIDE, 1), torch.arange(SIDE).view(1, 1, SIDE)
    down, across = (row - place[:, 0]).abs(), (column - place[:, 1]).abs()
    shapes = torch.stack(
        [
            (down < 2).expand(-1, SIDE, SIDE),
            (across < 2).expand(-1, SIDE, SIDE),
            torch.maximum(down, across) < 3,
            ((down < 2) | (across < 2)) & (down + across < 6),
        ]
    )
    shown = shapes[label, torch.arange(count)].float()
    return (shown + 0.5 * torch.randn(count, SIDE, SIDE, generator=generator)).unsqueeze(1), label


class Net(nn.Module):
    """Two convolutions and a linear layer, with `GroupNorm`: it keeps no statistics of its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.first_norm, self.second_norm = nn.GroupNorm(4, 16), nn.GroupNorm(4, 32)
        self.head = nn.Linear(32 * (SIDE // 4) ** 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first_norm(self.first(x))), 2)
        x = F.max_pool2d(F.relu(self.second_norm(self.second(x))), 2)
        return self.head(x.flatten(1))


def share_right(model: nn.Module) -> dict[str, float]:
    """Return the share of a thousand new pictures, the same ones everywhere, that the model gets right."""
    images, labels = pictures(1000, torch.Generator().manual_seed(12345))
    with torch.no_grad():
        return {"right": (model(images).argmax(1) == labels).float().mean().item()}


def tell(peer: p2ptrain.Peer) -> None:
    """Print where the model stands: peers of one state have the same parameters, to the bit."""
    parameters = p2ptrain.parameters_sha256(peer.model)
    loss = f"train loss {peer.status.loss}"
    print(f"round {peer.round}, {peer.status.members} members, {loss}: {peer.state_id} {parameters}")


def main() -> None:
    """Take part until the run's last round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["bootstrap", "join"])
    parser.add_argument("where", help="run.toml, or a peer's address")
    parser.add_argument("--home", required=True)
    parser.add_argument("--host", default=None)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures, and of the net's first values")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model, generator = Net(), torch.Generator().manual_seed(options.seed)

    take_part = p2ptrain.bootstrap if options.command == "bootstrap" else p2ptrain.join
    peer = take_part(options.where, model=model, home=options.home, host=options.host, evaluate=share_right)
    peer.on_round(tell)
    with peer:
        print(f"others join at {peer.address}", flush=True)
        while not peer.ended:
            images, labels = pictures(SAMPLES, generator)
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            peer.optimizer.step(samples=SAMPLES, loss=loss.item())

    right = share_right(model)["right"]
    print(f"{100 * right:.1f} % of new pictures right at {peer.state_id} {p2ptrain.parameters_sha256(model)}")


if __name__ == "__main__":
    main()
