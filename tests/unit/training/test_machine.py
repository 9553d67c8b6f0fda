"""What a process may use: the lowest of all limits, read from files as Linux writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from p2ptrain.training.machine import free_disk_bytes, this_machine

GIB = 2**30
MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB // 1024} kB\nHugePages_Total: 0\n"
CORES = len(os.sched_getaffinity(0))
UNLIMITED_V1 = 9223372036854771712


def tree(root: Path, files: Mapping[str, object]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    found = this_machine(tree(tmp_path, {}))
    assert (found.memory_bytes, found.free_bytes, found.memory_limit) == (16 * GIB, 12 * GIB, "this machine")
    assert found.cores == found.threads == CORES


def test_a_system_without_proc_is_asked_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    found, whole = this_machine(tmp_path), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.memory_bytes == whole and 0 < found.free_bytes < whole and found.cores == os.cpu_count()
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = this_machine(tmp_path)
    assert (found.memory_bytes, found.free_bytes) == (whole, whole)


def test_version_2_counts_the_groups_above_and_not_the_files_that_can_go(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/user.slice/job",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory",
        "sys/fs/cgroup/user.slice/memory.max": 6 * GIB,
        "sys/fs/cgroup/user.slice/memory.current": 5 * GIB,
        "sys/fs/cgroup/user.slice/memory.stat": f"anon 7\ninactive_file {3 * GIB}\nactive_file 9",
        "sys/fs/cgroup/user.slice/cpu.max": "max 100000",
        "sys/fs/cgroup/user.slice/job/memory.max": "max",
        "sys/fs/cgroup/user.slice/job/cpu.max": "50000 100000",
    }
    found = this_machine(tree(tmp_path, files))
    assert (found.memory_bytes, found.free_bytes) == (6 * GIB, 4 * GIB)
    assert found.memory_limit == "the control group /user.slice"
    assert (found.cores, found.threads) == (0.5, 1)


def test_what_a_group_is_slowed_down_at_is_a_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.high": 2 * GIB}
    assert this_machine(tree(tmp_path, files)).memory_bytes == 2 * GIB


def test_version_1_has_a_tree_for_each_controller(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/a/b\n3:cpu,cpuacct:/a\n1:name=systemd:/\n0::/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
        "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": 3 * GIB,
        "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": 2 * GIB,
        "sys/fs/cgroup/memory/a/b/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": 75000,
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": 100000,
        "sys/fs/cgroup/unified/cgroup.procs": 1,
    }
    found = this_machine(tree(tmp_path, files))
    assert (found.memory_bytes, found.free_bytes, found.cores) == (3 * GIB, GIB + GIB // 2, 0.75)
    assert found.memory_limit == "the control group /memory/a/b"


def test_a_container_that_sees_its_own_folder_alone_reads_that(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123abcd",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": GIB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 0,
    }
    assert this_machine(tree(tmp_path, files)).memory_bytes == GIB


def test_no_limit_and_nonsense_limit_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/\n3:cpu:/\nnonsense\n0::/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        "sys/fs/cgroup/cpu/cpu.max": "a few",
    }
    found = this_machine(tree(tmp_path, files))
    assert (found.memory_bytes, found.cores) == (16 * GIB, CORES)


def test_affinity_and_ulimit_of_a_real_process_count() -> None:
    code = (
        "import os, resource\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({GIB}, {GIB}))\n"
        "from p2ptrain.training.machine import this_machine\n"
        "found = this_machine()\n"
        "print(found.threads, found.memory_bytes, found.memory_limit)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split(maxsplit=2) == ["1", str(GIB), "ulimit -v\n"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold processes to it")
def test_what_the_owner_does_not_allow_the_system_refuses() -> None:
    code = (
        "import torch\n"
        "from p2ptrain.training.machine import limit_memory, this_machine\n"
        f"limit_memory({GIB})\n"
        "found = this_machine()\n"
        "print(found.memory_bytes, found.free_bytes <= found.memory_bytes, found.memory_limit)\n"
        "torch.zeros(2**27)\n"
        "try:\n"
        "    torch.zeros(2**28)\n"
        "except RuntimeError as error:\n"
        "    print('memory' in str(error))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(GIB), "True", "--max-memory", "True"]


def test_a_home_that_is_not_there_yet_is_on_its_parents_disk(tmp_path: Path) -> None:
    there = free_disk_bytes(tmp_path)
    assert free_disk_bytes(tmp_path / "a" / "b") == pytest.approx(there, rel=0.1)
