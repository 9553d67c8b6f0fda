"""Places in the code where a test may have this process die, as a machine does that loses its power.

P2PTRAIN_FAILPOINT=NAME@FILE ends the process with SIGKILL at the place NAME once FILE exists. Without it a failpoint
costs one look at the environment.
"""

from __future__ import annotations

import os
import signal


def failpoint(name: str) -> None:
    """Die here if the environment says so."""
    wanted, _, file = os.environ.get("P2PTRAIN_FAILPOINT", "").partition("@")
    if wanted == name and os.path.exists(file):
        os.kill(os.getpid(), signal.SIGKILL)
