"""The package's face: what it loads, what its optimizer is to torch, and what is refused before anything slow."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import p2ptrain
from p2ptrain.api.optimizer import SwarmOptimizer
from p2ptrain.config.loading import new_manifest, render
from p2ptrain.config.manifest import Manifest
from p2ptrain.errors import AddressError, ManifestError, ModelError
from p2ptrain.models.own import beginning_of, own_task

MANIFEST = Manifest(name="a", nonce="0" * 32)


def loaded_after(statement: str) -> set[str]:
    check = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_no_torch_and_the_optimizer_alone_no_network() -> None:
    assert not loaded_after("import p2ptrain; dir(p2ptrain)") & {"torch", "numpy", "hivemind", "numba"}
    loaded = loaded_after("import p2ptrain; p2ptrain.DeMo")
    assert "torch" in loaded and not loaded & {"hivemind", "multiaddr", "uvloop"}


def test_every_name_of_the_package_is_there_and_no_other() -> None:
    for name in sorted({*p2ptrain.__all__} - {"SwarmCallback"}):
        assert getattr(p2ptrain, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        p2ptrain.nothing  # noqa: B018


class Stepped:
    """An optimizer over a net, and what it handed on."""

    def __init__(self, folder: Path) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        config, _ = beginning_of(self.net).write(folder / "beginning")
        self.handed: list[tuple[int, float]] = []
        self.optimizer = SwarmOptimizer(
            own_task(self.net, folder / "beginning", config).parameters,
            MANIFEST,
            lambda samples, nats: self.handed.append((samples, nats)),
        )


def test_the_optimizer_hands_on_how_many_samples_there_were_and_their_loss(tmp_path: Path) -> None:
    stepped = Stepped(tmp_path)

    def closure() -> float:
        loss = stepped.net(torch.ones(5, 3)).square().mean()
        loss.backward()
        return loss.item()

    assert stepped.optimizer.step(samples=7, loss=0.5) is None
    stepped.optimizer.samples_per_step = 4
    assert stepped.optimizer.step(closure) == stepped.handed[1][1]
    stepped.optimizer.step(samples=1)
    assert [samples for samples, _ in stepped.handed] == [7, 4, 1]
    assert stepped.handed[0][1] == 0.5 and stepped.handed[2][1] != stepped.handed[2][1]
    assert stepped.net[0].weight.grad is not None, "with gradients recorded"


@pytest.mark.parametrize("samples", [0, -1, 2**20 + 1])
def test_numbers_of_samples_out_of_range_are_refused(tmp_path: Path, samples: int) -> None:
    stepped = Stepped(tmp_path)
    with pytest.raises(ValueError, match="samples="):
        stepped.optimizer.step(samples=samples)
    assert stepped.handed == []


def test_groups_show_the_manifests_rates_by_kind_whatever_a_scheduler_writes(tmp_path: Path) -> None:
    stepped = Stepped(tmp_path)
    optimizer = stepped.optimizer
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 7.0)
    optimizer.show_rate(0.5)
    rates = {group["kind"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"matrix": 0.75, "vector": 16.0, "head": 16.0}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in stepped.net.parameters()}


def test_a_state_that_was_saved_loads_and_holds_nothing_of_the_swarm(tmp_path: Path) -> None:
    optimizer = Stepped(tmp_path).optimizer
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"] == {}
    optimizer.load_state_dict(state)


# ---- refused at once ------------------------------------------------------------------------------------------------


def run_toml(folder: Path, manifest: Manifest) -> Path:
    path = folder / "run.toml"
    path.write_text(render(manifest))
    return path


def test_what_cannot_be_trained_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    path, home = run_toml(tmp_path, new_manifest("a")), tmp_path / "home"
    with pytest.raises(ModelError, match="keeps running statistics"):
        p2ptrain.bootstrap(path, model=nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), home=home)
    with pytest.raises(ModelError, match="no parameter is called"):
        p2ptrain.bootstrap(path, model=nn.Linear(2, 2), home=home, kinds={"nothing": "matrix"})
    with pytest.raises(AddressError):
        p2ptrain.join("nowhere", model=nn.Linear(2, 2), home=home)
    with pytest.raises(ManifestError, match="strategy diloco takes inner steps"):
        p2ptrain.bootstrap(run_toml(tmp_path, new_manifest("a", "diloco")), model=nn.Linear(2, 2), home=home)
    assert not home.exists()


def test_a_peer_that_is_not_running_says_so(tmp_path: Path) -> None:
    peer = p2ptrain.bootstrap(run_toml(tmp_path, new_manifest("a")), model=nn.Linear(2, 2), home=tmp_path / "home")
    for ask in (lambda: peer.round, lambda: peer.state_id, lambda: peer.address, lambda: peer.optimizer):
        with pytest.raises(RuntimeError, match="with peer"):
            ask()
