"""Choose the device that a replica lives on."""

from __future__ import annotations

import torch

from p2ptrain.errors import HomeError


def choose_device(name: str, memory_bytes: int = 0) -> torch.device:
    """Return the device called `name`; "auto" is cuda, else mps, else cpu.

    Args:
        memory_bytes: most that this process may take of a CUDA device, from now on; 0: no limit.

    Raises:
        HomeError: this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise HomeError(f"this machine has no {name} device", hint="again with --device cpu")
    device = torch.device(name)
    if name == "cuda" and memory_bytes:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total), torch.cuda.current_device())
    return device
