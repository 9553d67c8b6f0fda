"""What this process may use of the machine: memory, cores and disk, whoever limits them.

A container, a service manager and a shell's `ulimit` each give a process less than the machine has. The limits of
control groups are read for the process's own group and all above it, in both versions of their files (Linux,
admin-guide/cgroup-v2 and cgroup-v1); of all limits the lowest counts. Swap does not count: rounds that swap never end.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT_BYTES = 2**60
"""Version 1 of control groups says a number of this order where there is no limit."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process may use."""

    memory_bytes: int
    """At most, of all that it holds."""
    free_bytes: int
    """Of that, what is neither held by anybody else nor by this process."""
    cores: float
    """Of processors' time; a quota may leave a part of one."""
    memory_limit: str = "this machine"
    """What limits the memory, for people."""
    bfloat16: bool = False
    """Whether the processor has instructions for products in it."""

    @property
    def threads(self) -> int:
        """How many threads have a core each; at least one."""
        return max(1, int(self.cores))


_own_limits: set[int] = set()


def limit_memory(memory_bytes: int) -> None:
    """Have the system refuse this process, and each that it starts, private memory beyond `memory_bytes`.

    Mapped files do not count, as little as they cost: the system takes their pages back when it needs them. What is
    refused comes up as MemoryError, or as PyTorch's error, on which a micro-batch is halved.

    Raises:
        OSError, ValueError: the system has a lower limit, which cannot be raised.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    _own_limits.add(memory_bytes)


def this_machine(root: Path = Path("/")) -> Machine:
    """Read what this process may use.

    Args:
        root: of the file system that has `proc` and `sys`.
    """
    total, free = _of_meminfo(root / "proc" / "meminfo")
    limited_by = "this machine"
    for group in _groups(root, "memory"):
        limit, used = _memory_of(group)
        if limit is None:
            continue
        if limit < total:
            total, limited_by = limit, f"the control group {_name(group, root)}"
        free = min(free, max(0, limit - used))
    for kind, what in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and limit < total:
            total, limited_by = limit, "--max-memory" if limit in _own_limits else what
            free = min(free, limit)
    # macOS binds no process to processors.
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in _groups(root, "cpu"):
        quota = _quota_of(group)
        cores = cores if quota is None else min(cores, quota)
    flags = next((line for line in _text(root / "proc" / "cpuinfo").splitlines() if line.startswith("flags")), "")
    return Machine(total, free, cores, limited_by, not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags.split()))


def free_disk_bytes(path: Path) -> int:
    """Return the room on the disk that `path` is on, or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _of_meminfo(path: Path) -> tuple[int, int]:
    """Return the machine's memory, and what of it programs can have."""
    found = {}
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            found[name] = int(number[0]) * 1024
    if "MemTotal" not in found:
        return _of_sysconf()
    return found["MemTotal"], found.get("MemAvailable", found["MemTotal"])


def _of_sysconf() -> tuple[int, int]:
    """Return the same where the system has no /proc: without psutil all memory counts as available."""
    try:
        import psutil
    except ImportError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of those above it, in both versions."""
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            tops = [root / "sys/fs/cgroup/unified", root / "sys/fs/cgroup"]
        elif controller in names.split(","):
            tops = [root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup" / names]
        else:
            continue
        top = next((top for top in tops if top.is_dir()), None)
        if top is None:
            continue
        # A container that shares its host's names sees only its own folder, which then lies at the top.
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_dir():
                yield folder
            if folder == top:
                break


def _name(group: Path, root: Path) -> str:
    return "/" + "/".join(group.relative_to(root / "sys/fs/cgroup").parts)


def _memory_of(group: Path) -> tuple[int | None, int]:
    """Return a group's limit, None where it has none, and what it holds that cannot be given back."""
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT_BYTES]
    if not known:
        return None, 0
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    files = 0
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.strip().isdigit():
            files = int(value)
    return min(known), max(0, used - files)


def _quota_of(group: Path) -> float | None:
    """Return how many processors' time a group has; None: as much as there is."""
    both = _text(group / "cpu.max").split()
    if len(both) == 2 and both[0].isdigit() and both[1].isdigit():
        return int(both[0]) / max(int(both[1]), 1)
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="ascii")
    return ""
