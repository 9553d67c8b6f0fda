"""Choose the device that a replica lives on."""

from __future__ import annotations

import torch

from p2ptrain.errors import HomeError


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is cuda, else mps, else cpu.

    Raises:
        HomeError: this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise HomeError(f"this machine has no {name} device", hint="again with --device cpu")
    return torch.device(name)
