"""Everything that wants a GPU, in one command of under eight minutes, as one JSON object.

    python scripts/gpu_checks.py --out docs/results/gpu_checks.json

- `selftest`: whether the device computes the bits of every other one, and the seconds that takes with nothing compiled
  before and with all compiled.
- `steps`: what an optimizer's step takes at 100M and at a billion parameters, with signs and with a new run's
  directions (`scripts/bench/codec.py`).
- `swarm`: two peers on the GPU and one on the CPU, all on this machine, for --rounds rounds. The third comes late; the
  second is killed half way and goes on from its checkpoint on the CPU, as the third does on the GPU. All end with one
  state id.
- peak memory of the GPU and of each process.

With --device cpu all of it but the steps runs without a GPU. Progress on stderr; exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import torch
from codec import GPU_MODEL, cuda_figures
from lab.report import Figures, finish, machine, note

P2PTRAIN = (sys.executable, "-m", "p2ptrain")
SMALLER_MODEL = {"layers": 12, "embedding": 768, "vocabulary": 32_768}
"""A GPT of 135 million parameters."""
SELF_TEST = """
import sys, time, torch
from p2ptrain.training.selftest import make_ready
began = time.monotonic()
make_ready(torch.device(sys.argv[1]))
print(time.monotonic() - began)
"""
LIMIT_SECONDS = 240.0


class DeviceMemory:
    """The most that was taken of the GPU at once, by whomever, looked at ten times a second."""

    def __init__(self, device: str) -> None:
        self.peak_bytes = 0
        self._on, self._done = device == "cuda", threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> DeviceMemory:
        if self._on:
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            free, total = torch.cuda.mem_get_info()
            self.peak_bytes = max(self.peak_bytes, total - free)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._on:
            self._thread.join()


class Peer:
    """A peer's process, and those before it in the same home."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.home, self.log = name, folder / name, folder / f"{name}.log"
        self._process: subprocess.Popen[str] | None = None

    def start(self, device: str, *arguments: str) -> None:
        """Start it, or start it again, on a device."""
        flags = ("--home", str(self.home), "--name", self.name, "--host", "127.0.0.1", "--device", device)
        with self.log.open("a") as errors:
            self._process = subprocess.Popen(
                [*P2PTRAIN, *arguments, *flags], stdout=subprocess.PIPE, stderr=errors, text=True
            )

    @property
    def process(self) -> subprocess.Popen[str]:
        """The last that was started."""
        assert self._process is not None
        return self._process

    def address(self) -> str:
        """Wait for its join line; returns the address in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"p2ptrain join (/\S+)", line):
                return found[1]
        raise SystemExit(f"no join line:\n{self.log.read_text()[-3000:]}")

    @property
    def round(self) -> int:
        """The newest in its journal."""
        return max((int(path.name.split("-")[1]) for path in (self.home / "journal").glob("round-*")), default=0)

    def reaches(self, number: int) -> None:
        """Wait until its journal holds this round."""
        self._until(lambda: self.round >= number, f"round {number}")

    def _until(self, there: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + LIMIT_SECONDS
        while not there():
            if self.process.poll() not in (None, 0) or time.monotonic() > until:
                raise SystemExit(f"{self.name} does not come to {what}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait()

    def ended(self) -> tuple[str, str]:
        """Wait for its end; returns the state id and the hash of the parameters that it ended with."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_bytes = usage.ru_maxrss * 1024
        found = re.findall(r"state (\w{64}), parameters sha256 (\w{64})", self.log.read_text())
        if self.process.returncode or not found:
            raise SystemExit(f"{self.name} ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
        state, parameters = found[-1]
        return state, parameters

    def close(self) -> None:
        """End it, whatever it does."""
        if self._process is not None and self._process.poll() is None:
            self.kill()


def self_test(device: str) -> Figures:
    """Its seconds, without and with what was compiled before."""
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for what in ("nothing compiled", "all compiled"):
            note(f"self-test on {device}: {what}")
            environment = {**os.environ, "XDG_CACHE_HOME": cache}
            done = subprocess.run(
                [sys.executable, "-c", SELF_TEST, device], capture_output=True, text=True, env=environment
            )
            if done.returncode:
                return {"passed": False, "said": done.stderr[-500:]}
            seconds.append(round(float(done.stdout.split()[-1]), 1))
    return {"passed": True, "seconds_nothing_compiled": seconds[0], "seconds_all_compiled": seconds[1]}


def swarm(device: str, size: str, rounds: int, folder: Path) -> Figures:
    """See the module docstring."""
    run = folder / "run.toml"
    made = subprocess.run([*P2PTRAIN, "init", str(run), "--size", size], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(made.stderr)
    settings = {"last_round": rounds, "min_seconds": 0.5, "max_seconds": 2.0, "root_interval": 8}
    text = run.read_text()
    for key, value in settings.items():
        text = re.sub(rf"(?m)^#? ?{key} = .*$", f"{key} = {value}", text)
    run.write_text(text)
    ada, bob, carol = peers = [Peer(folder, name) for name in ("ada", "bob", "carol")]
    began = time.monotonic()
    try:
        ada.start(device, "bootstrap", str(run))
        address = ada.address()
        bob.start(device, "join", address)
        bob.reaches(rounds // 5)
        note(f"swarm: {device} and {device} are at round {bob.round}; a late one comes on the CPU")
        carol.start("cpu", "join", address)
        carol.reaches(2 * rounds // 5)
        for peer, other in ((bob, "cpu"), (carol, device)):
            peer.kill()
            note(f"swarm: {peer.name} was killed at round {peer.round}, and goes on with device {other}")
            peer.start(other, "join", "--checkpoint-every", "5")
            peer.reaches(peer.round + rounds // 10)
        ends = [peer.ended() for peer in peers]
    finally:
        for peer in peers:
            peer.close()
    return {
        "size": size,
        "rounds": rounds,
        "devices": {"ada": [device], "bob": [device, "cpu"], "carol": ["cpu", device]},
        "one_state_id": len(set(ends)) == 1,
        "state_id": ends[0][0],
        "seconds": round(time.monotonic() - began, 1),
        "peak_megabytes": {peer.name: round(peer.peak_bytes / 1e6) for peer in peers},
    }


def main() -> int:
    """All checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--size", default="25M", help="of the swarm's model, as p2ptrain init has it; %(default)s")
    parser.add_argument("--rounds", type=int, default=50, help="of the swarm; %(default)s")
    parser.add_argument("--out", type=Path, help="write the result there, too")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device; --device cpu runs what can be run without")
    began = time.monotonic()
    result: Figures = machine() | {"selftest": self_test(options.device)}
    with DeviceMemory(options.device) as memory:
        result["steps"] = {"100M": cuda_figures(SMALLER_MODEL), "1B": cuda_figures(GPU_MODEL)}
    result["steps_peak_device_bytes"] = memory.peak_bytes
    if options.device == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="p2ptrain-gpu-") as folder, DeviceMemory(options.device) as memory:
        result["swarm"] = swarm(options.device, options.size, options.rounds, Path(folder))
    result["swarm"]["peak_device_bytes"] = memory.peak_bytes
    result["seconds"] = round(time.monotonic() - began, 1)
    finish(options.out, result)
    return 0 if result["selftest"]["passed"] and result["swarm"]["one_state_id"] else 1


if __name__ == "__main__":
    sys.exit(main())
