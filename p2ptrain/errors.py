"""Errors that a user can act on: what failed, the likely cause, the next command, and an exit code.

Exit codes are part of the interface; docs/cli.md lists them with causes and cures.
"""

from __future__ import annotations

from typing import ClassVar


class P2PTrainError(Exception):
    """A failure with a cause that the user can read. `hint` is the next thing to type or do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(P2PTrainError):
    """The command line does not make sense."""

    exit_code = 2


class ManifestError(P2PTrainError):
    """The manifest is malformed, impossible, or not the one it claims to be."""

    exit_code = 3


class AddressError(P2PTrainError):
    """Something that should be a peer's address is not one."""

    exit_code = 4


class UnreachableError(P2PTrainError):
    """Nobody answers at the addresses given."""

    exit_code = 5


class ClockSkewError(P2PTrainError):
    """This machine's clock differs from the swarm's by more than the DHT tolerates."""

    exit_code = 6


class PortInUseError(P2PTrainError):
    """The port asked for is taken."""

    exit_code = 7


class RunChoiceError(P2PTrainError):
    """No run, or several, where one was expected."""

    exit_code = 8


class NoRunError(RunChoiceError):
    """No run where one was expected; there may be one later."""


class DataError(P2PTrainError):
    """The run's data is missing or is not what the manifest names."""

    exit_code = 9


class HomeError(P2PTrainError):
    """The home directory is in use, or lacks what the command needs."""

    exit_code = 10


class DivergenceError(P2PTrainError):
    """This machine does not compute the bits that the run requires."""

    exit_code = 11


class DaemonError(P2PTrainError):
    """The libp2p daemon does not start or does not stay up."""

    exit_code = 12


class AccessError(P2PTrainError):
    """The run is for some peers only, and this one is none of them."""

    exit_code = 14


class RevokedError(P2PTrainError):
    """The run's owner has shut this peer out."""

    exit_code = 15


class TransferSpentError(P2PTrainError):
    """The owner's monthly transfer is used up; the peer may start again when the next month begins."""

    exit_code = 20


class ModelError(P2PTrainError):
    """The model cannot be trained by a swarm, or is another one than the run's."""

    exit_code = 16


class NotRunningError(P2PTrainError):
    """No peer runs in the home that a command is for."""

    exit_code = 17


class TooLargeError(P2PTrainError):
    """This machine cannot hold what a peer of the run needs."""

    exit_code = 18
