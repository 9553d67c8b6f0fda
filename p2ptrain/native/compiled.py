"""Loops compiled for this machine, by numba: the codec's work is bit by bit and entry by entry, which numpy can only do
in many passes over arrays, and torch in more.

Python's lock is free while they run. A division by zero is infinite, as in numpy. Nothing is reordered, and but for
`vectorised` nothing contracted: floats round as IEEE 754 says, operation by operation. Each is compiled at its first
call with arguments of some types, in a second or so, and kept on disk (`kept`) until anything changes that it may be
made of; `training/selftest.py` calls all of them before a peer's first round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba

from p2ptrain.native.kept import keep

logging.getLogger("numba").setLevel(logging.WARNING)  # at DEBUG it tells of every instruction

Function = TypeVar("Function", bound=Callable[..., Any])
#: all that were made, each with the `signatures` it was compiled for
ALL: list[Any] = []


def compiled(function: Function) -> Function:
    """`function` as machine code, every index checked: what it reads may be a stranger's bytes. That costs 1 %."""
    return _compiled(function, boundscheck=True)


def vectorised(function: Function) -> Function:
    """`function` as machine code, for loops over numbers of our own whose indices are those of ranges: none is checked,
    as that takes one entry at a time, and a product and a sum may round once."""
    return _compiled(function, boundscheck=False, fastmath={"contract"})


def elementwise(function: Function) -> Function:
    """As `vectorised`, but each operation is rounded on its own."""
    return _compiled(function, boundscheck=False)


def _compiled(function: Function, **options: Any) -> Function:
    made: Any = numba.njit(nogil=True, error_model="numpy", **options)(function)
    keep(made)
    ALL.append(made)
    kept: Function = made
    return kept
