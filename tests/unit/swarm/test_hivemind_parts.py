"""hivemind loaded by parts is hivemind: each name means what its own `__init__.py` says."""

from __future__ import annotations

import subprocess
import sys

NAMES = """
import sys
import p2ptrain.swarm.node
assert "torch" not in sys.modules

import hivemind, hivemind.dht, hivemind.utils
from hivemind.dht import DHTID, DHTNode
from hivemind.utils import get_dht_time, get_logger
assert hivemind.__version__ == "1.1.12" and "torch" not in sys.modules
assert DHTNode is sys.modules["hivemind.dht.node"].DHTNode
assert DHTID is sys.modules["hivemind.dht.routing"].DHTID
try:
    hivemind.no_such_name
except AttributeError as error:
    assert str(error) == "module 'hivemind' has no attribute 'no_such_name'"
else:
    raise AssertionError

# Whoever trains by hivemind in the same process has all of it.
from hivemind import DHT, Optimizer
from hivemind.averaging.averager import DecentralizedAverager
assert hivemind.DHT is DHT is sys.modules["hivemind.dht.dht"].DHT
assert hivemind.DecentralizedAverager is DecentralizedAverager
assert hivemind.optim.Optimizer is Optimizer
"""


def test_each_name_means_what_hivemind_says() -> None:
    subprocess.run([sys.executable, "-c", NAMES], check=True)


def test_hivemind_that_is_loaded_already_stays_as_it_is() -> None:
    program = "import hivemind, p2ptrain.swarm.node; assert '__getattr__' not in vars(hivemind)"
    subprocess.run([sys.executable, "-c", program], check=True)
