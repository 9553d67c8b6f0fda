"""A peer's home directory: identity, manifest, journal, checkpoints. One process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import platformdirs
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain.errors import HomeError
from p2ptrain.state.files import atomic_write


def default_home() -> Path:
    """$P2PTRAIN_HOME, else the platform's data directory."""
    return Path(os.environ.get("P2PTRAIN_HOME") or platformdirs.user_data_dir("p2ptrain"))


class Home:
    """Paths of a home directory, made on first use, readable by its owner alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for directory in (path, path / "journal", path / "checkpoints", path / "own", path / "data"):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise HomeError(f"cannot use {path} as home: {error}", hint="choose another with --home DIR") from error
        self.identity = path / "identity.key"
        self.owner_key = path / "owner.key"
        self.manifest = path / "manifest.signed"
        self.port = path / "port"
        self.peers = path / "peers.json"
        self.journal = path / "journal"
        self.checkpoints = path / "checkpoints"
        self.own = path / "own"
        self.data = path / "data"
        self.node_settings = path / "node.toml"
        self._lock: int | None = None

    def lock(self) -> None:
        """Claim the home for this process.

        Raises:
            HomeError: another process has it.
        """
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode() or "another process"
            os.close(handle)
            raise HomeError(
                f"home {self.path} is in use by process {holder}", hint="stop it, or choose another with --home DIR"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._lock = handle

    def unlock(self) -> None:
        """Give the home back; harmless when not locked."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load_or_create_owner_key(self) -> Ed25519PrivateKey:
        """The key that signs manifests bootstrapped from this home."""
        if not self.owner_key.exists():
            atomic_write(self.owner_key, Ed25519PrivateKey.generate().private_bytes_raw(), durable=True)
        return Ed25519PrivateKey.from_private_bytes(self.owner_key.read_bytes())

    def remembered_port(self) -> int:
        """The port used last, or 0."""
        try:
            return int(self.port.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def remember_port(self, port: int) -> None:
        """Use this port again next time, so that addresses handed out stay good."""
        atomic_write(self.port, str(port).encode())
