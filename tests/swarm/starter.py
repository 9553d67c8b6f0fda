"""Starts `p2ptrain` processes as forks of itself, which need not load torch, hivemind and compiled loops for seconds.

Reads requests from a socket, the number of which it is given: arguments and environment as JSON, with the new process's
stdout and stderr. Answers {"started": pid}, and says {"ended": [pid, exit code]} when it has. Ends with the other end
of the socket.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import select
import socket
import sys
import tempfile
import time


def enter(namespace: str) -> None:
    """Have this process, and all that it starts, in a network namespace that `ip netns` has made."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns", namespace)


def serve(requests: socket.socket) -> list[str] | None:
    """Returns the arguments, in a process that was started; None in this one, at its end."""
    #: file descriptor of a process -> its id
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, *running], [], [])
        for ended in set(ready) & running.keys():
            pid = running.pop(ended)
            os.close(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            requests.send(json.dumps({"ended": [pid, code]}).encode())
        if requests not in ready:
            continue
        message, given, _, _ = socket.recv_fds(requests, 2**20, 2)
        if not message:
            return None
        asked = json.loads(message)
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate(given, 1):
                os.dup2(file, number)
            for file in (*given, *running):
                os.close(file)
            requests.close()
            os.environ.clear()
            os.environ.update(asked["environment"])
            namespace = os.environ.get("TEST_NETWORK")
            if namespace:
                enter(namespace)
            tempfile.tempdir = None  # as the environment has it
            arguments: list[str] = asked["arguments"]
            return arguments
        for file in given:
            os.close(file)
        running[os.pidfd_open(pid)] = pid
        requests.send(json.dumps({"started": pid}).encode())


if __name__ == "__main__":
    import hivemind  # noqa: F401
    import torch

    import p2ptrain.cli.main
    import p2ptrain.observe.census
    import p2ptrain.peer.session  # noqa: F401
    from p2ptrain.training.selftest import make_ready

    torch.set_num_threads(1)
    make_ready(torch.device("cpu"))
    # The timer of `make_ready` takes a moment to end.
    deadline = time.monotonic() + 10.0
    while len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < deadline, "a fork has none of the other threads"
        time.sleep(0.01)
    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is not None:
        sys.argv[1:] = arguments
        runpy.run_module("p2ptrain", run_name="__main__", alter_sys=True)
