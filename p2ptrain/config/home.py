"""A peer's home directory: identity, manifest, journal, checkpoints. One process at a time, one owner.

The lock is the kernel's (`flock`): it goes with the process that held it, however that ended, so that no stale lock
ever has to be deleted by hand.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain.errors import HomeError
from p2ptrain.state.files import UNFINISHED_PREFIX, atomic_write, remove_unfinished

_OWNER_KEY_BYTES = 32


def default_home(environment: Mapping[str, str] = os.environ) -> Path:
    """$P2PTRAIN_HOME, else the platform's data directory."""
    return Path(
        environment.get("P2PTRAIN_HOME") or platformdirs.user_data_dir("p2ptrain", appauthor=False)
    ).expanduser()


class Home:
    """Where each thing of a peer lies. Constructing it touches no file; `create` and `lock` make the directories."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: libp2p private key, which is this peer's id
        self.identity = path / "identity.key"
        #: Ed25519 private key that signs the manifests bootstrapped from here
        self.owner_key = path / "owner.key"
        #: this machine's settings, written by its owner alone
        self.node_settings = path / "node.toml"
        #: signed manifest of the run that this home takes part in
        self.manifest = path / "manifest.signed"
        #: the grant by which this home is in that run, where it came as a guest
        self.grant = path / "grant"
        #: the line by which others could join at this peer last
        self.address = path / "address"
        #: what this month has carried so far
        self.transfer = path / "transfer.json"
        #: the port listened on last
        self.port = path / "port"
        #: addresses of peers once seen
        self.peers = path / "peers.json"
        #: seals and replies
        self.journal = path / "journal"
        self.checkpoints = path / "checkpoints"
        #: own contributions that are not settled yet
        self.own = path / "own"
        #: members of the last state that this peer shared with another
        self.company = path / "company"
        #: what this peer heard and decided before its last failure
        self.decisions = path / "decisions.log"
        #: what this peer and others have measured of the model, a line each
        self.evaluations = path / "evaluations.jsonl"
        #: where the peer that runs here hears its owner's commands
        self.control = path / "control"
        #: what the peer that runs here says, the newest lines of it
        self.log = path / "peer.log"
        #: what happened to this peer, as JSON lines
        self.events = path / "events"
        #: seals of all rounds that this peer went through, without their replies
        self.seals = path / "seals"
        #: corpora and their tokens
        self.data = path / "data"
        #: names, shapes, kinds and first values, where the run trains a model of somebody's own
        self.beginning = path / "beginning"
        #: the text that this peer alone trains on
        self.own_tokens = self.data / "own.tokens"
        #: tokens that are being made
        self.unfinished_tokens = self.data / f"{UNFINISHED_PREFIX}tokens"
        #: first values that are being made
        self.unfinished_values = self.data / f"{UNFINISHED_PREFIX}values"
        self._lock: int | None = None

    def tokens(self, root: str) -> Path:
        """Where the run's text lies as tokens, by the root that the manifest names."""
        return self.data / f"{root}.tokens"

    def values(self, root: str) -> Path:
        """Where the first values of a model lie that the manifest describes, by the root that it names."""
        return self.data / f"{root}.values"

    def create(self) -> None:
        """Make the directories that are missing.

        Raises:
            HomeError: this user may not.
        """
        try:
            for directory in self._directories():
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise self._unusable(error) from error

    def lock(self) -> None:
        """Create the home and claim it for this process, until `unlock` or the process's end.

        Raises:
            HomeError: another process has it, or this user may not use it.
        """
        self.create()
        try:
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 32).decode("ascii", "replace")
            os.close(handle)
            if not isinstance(error, BlockingIOError):
                raise self._unusable(error) from error
            raise HomeError(
                f"home {self.path} is in use by {f'process {holder}' if holder else 'another process'}",
                hint="stop it, or choose another home with --home DIR",
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._lock = handle
        for directory in self._directories():
            remove_unfinished(directory)

    def unlock(self) -> None:
        """Give the home back; harmless when not locked."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            # Closing alone would leave it to processes that were forked meanwhile, as those that load data are.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None

    def load_or_create_owner_key(self) -> Ed25519PrivateKey:
        """The key that signs manifests bootstrapped from this home.

        Raises:
            HomeError: the file cannot be read or written, or is no such key.
        """
        self.create()
        try:
            if not self.owner_key.exists():
                atomic_write(self.owner_key, Ed25519PrivateKey.generate().private_bytes_raw(), durable=True)
            data = self.owner_key.read_bytes()
        except OSError as error:
            raise self._unusable(error) from error
        if len(data) != _OWNER_KEY_BYTES:
            raise HomeError(
                f"{self.owner_key} is not an Ed25519 key",
                hint=f"restore it from a copy, or start anew: mv {self.owner_key} {self.owner_key}.old",
            )
        return Ed25519PrivateKey.from_private_bytes(data)

    def remembered_port(self) -> int:
        """The port used last, or 0."""
        try:
            port = int(self.port.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0
        return port if 0 < port < 65536 else 0

    def remember_port(self, port: int) -> None:
        """Use this port again next time, so that addresses handed out stay good."""
        atomic_write(self.port, str(port).encode())

    def _directories(self) -> tuple[Path, ...]:
        return self.path, self.journal, self.checkpoints, self.own, self.data

    def _unusable(self, error: OSError) -> HomeError:
        return HomeError(
            f"cannot use {self.path} as home: {error.strerror}: {error.filename or self.path}",
            hint="choose another with --home DIR, or set P2PTRAIN_HOME",
        )
