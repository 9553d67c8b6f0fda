"""What trains needs no network: not even its libraries are loaded."""

from __future__ import annotations

import subprocess
import sys


def test_the_trainer_loads_no_network_library() -> None:
    check = (
        "import sys, p2ptrain.training.trainer\n"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'hivemind', 'multiaddr', 'uvloop'}\n"
        "calls = [name for name in sys.modules if name.startswith(('p2ptrain.calls', 'p2ptrain.peer'))]\n"
        "sys.exit(str((loaded, calls)) if loaded or calls else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
