"""What the libp2p daemon has on the wire, headers and retransmissions included, as the kernel counts it.

Linux tells of each TCP socket how many bytes and segments it has sent and received (`tcp(7)`, TCP_INFO), to any user,
by a netlink request (`sock_diag(7)`). The daemon's sockets are those that its open files name. To the bytes come
headers: `HEADER_BYTES` a segment, acknowledgements among them. The link's own frames (Ethernet: 14 bytes and more) are
not counted, as contracts do not count them either.

Cost: some 0.5 ms a look with a hundred sockets on the machine. What a connection carries between the last look and its
end is not seen, nor is what is no TCP: a few packets by which a router is asked for a port.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator

HEADER_BYTES = {socket.AF_INET: 52, socket.AF_INET6: 72}
"""Of IP and of TCP with time stamps, a segment."""
_LOOK_TIMEOUT_SECONDS = 1.0
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP = 4, 20, 0x301
_DONE, _ERROR = 3, 2
_INET_DIAG_INFO = 2
_ALL_BUT_LISTENING = 0xFFF & ~(1 << 10)
_MESSAGE_BYTES = 72
"""Of `inet_diag_msg`, whose last field is the socket's inode and which has its cookie at 44."""


class Wire:
    """Counts from its construction on; survives that the daemon is started again.

    Args:
        daemon_pid: process id of the daemon that runs now.
    """

    def __init__(self, daemon_pid: Callable[[], int]) -> None:
        self._daemon_pid = daemon_pid
        #: {cookie of a socket: what it had sent and received at the last look}
        self._sockets: dict[bytes, tuple[int, int]] = {}
        self.sent = self.received = 0

    def look(self) -> None:
        """Bring `sent` and `received` up to date. Raises OSError where the kernel does not tell."""
        inodes = _sockets_of(self._daemon_pid())
        sockets: dict[bytes, tuple[int, int]] = {}
        for family in HEADER_BYTES:
            for inode, cookie, sent, received in _tcp_sockets(family):
                if inode in inodes or (cookie in self._sockets and not inode):
                    before = self._sockets.get(cookie, (0, 0))
                    self.sent += max(0, sent - before[0])
                    self.received += max(0, received - before[1])
                    sockets[cookie] = sent, received
        self._sockets = sockets


def _sockets_of(pid: int) -> set[int]:
    """Return the inodes of a process's sockets. Raises OSError."""
    inodes = set()
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes


def _tcp_sockets(family: int) -> Iterator[tuple[int, bytes, int, int]]:
    """Yield (inode, cookie, bytes sent, bytes received) of this network namespace's TCP sockets. Raises OSError."""
    request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), 0, _ALL_BUT_LISTENING)
    request += bytes(48)  # any socket
    header = struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as asking:
        asking.settimeout(_LOOK_TIMEOUT_SECONDS)
        asking.send(header + request)
        while True:
            data = asking.recv(1 << 18)
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                if kind == _DONE:
                    return
                if kind == _ERROR or length < 16:
                    raise OSError(-struct.unpack_from("=i", data, 16)[0], "the kernel does not tell of sockets")
                found = _read(data[16:length], HEADER_BYTES[socket.AddressFamily(family)])
                if found is not None:
                    yield found
                data = data[(length + 3) & ~3 :]


def _read(message: bytes, header_bytes: int) -> tuple[int, bytes, int, int] | None:
    (inode,) = struct.unpack_from("=I", message, _MESSAGE_BYTES - 4)
    cookie, attributes = message[44:52], message[_MESSAGE_BYTES:]
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if length < 4:
            return None
        info = attributes[4:length]
        if kind == _INET_DIAG_INFO and len(info) >= 144:
            # `tcp_info` of linux/tcp.h: bytes_acked, bytes_received, segs_out, segs_in; bytes_sent from 4.19 on.
            acked, received, segments_out, segments_in = struct.unpack_from("=QQII", info, 120)
            sent = struct.unpack_from("=Q", info, 200)[0] if len(info) >= 208 else acked
            return inode, cookie, sent + header_bytes * segments_out, received + header_bytes * segments_in
        attributes = attributes[(length + 3) & ~3 :]
    return None
