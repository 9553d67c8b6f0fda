"""Memory that a peer has no use for: what was freed goes back to the system, and what is not needed is not loaded.

The C library keeps what a thread frees for that thread's next use. What making tokens, loading compiled code and
restoring a replica have freed is not used again, and would stay with the process for as long as it trains.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
from types import FunctionType

import torch


def give_back() -> None:
    """Give back what is free, where the C library can (glibc); it takes milliseconds. Elsewhere nothing happens."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def load_no_compiler() -> None:
    """Have torch leave its compiler unloaded, which a peer does not use: some 90 MB, and seconds at a start.

    Methods of optimizers and the operator of the built-in model's loss, among others, are marked as not to be compiled
    at their first call, and to mark them loads the compiler (`torch._compile`). Here all that are loaded are marked
    with themselves, where torch keeps the mark. A version of torch that does this otherwise is left as it is.
    Recomputed activations load the compiler all the same.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.nn.modules.linear_cross_entropy")
    for function in gc.get_objects():
        # By its type alone: whatever else is there must not be asked anything.
        if type(function) is FunctionType and function.__code__.co_filename == torch._compile.__file__:
            inner = getattr(function, "__wrapped__", None)
            if inner is not None:
                inner.__dynamo_disable = inner
