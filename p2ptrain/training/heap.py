"""Memory that was freed, given back to the system.

The C library keeps what a thread frees for that thread's next use. What making tokens, loading compiled code and
restoring a replica have freed is not used again, and would stay with the process for as long as it trains.
"""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Give back what is free, where the C library can (glibc); it takes milliseconds. Elsewhere nothing happens."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
