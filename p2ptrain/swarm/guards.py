"""What hivemind 1.1.12 lacks and a stranger, or bad luck, could use to crash or fill a node. Install before any node.

1. msgpack extension types that nest recurse through Python and C without bound: one 4 KB message ends the process with
   a segmentation fault. Nesting is cut at `MAX_EXTENSION_DEPTH`.
2. A stream frame states its own length, and the reader buffers until it is there. Frames are cut at `MAX_FRAME_BYTES`.
3. A node stores whatever it is asked to, for as long as it is asked to. `storage` caps that.
4. A request may name any number of keys: to store under, a signature each, or to find, up to 1 MiB each. Both are
   capped, and so is how often one peer may ask.
5. A dictionary may have any number of records, a signature each. More than a node of ours would store are refused.
   And where one expires on its way, hivemind refuses all of them: it is left out.
6. An answer that comes just as its call was cancelled or timed out ends the task that reads the daemon's answers, and
   with it the daemon's use. Such an answer is dropped.
7. Whoever asks says its own node's id. One that is none ends a task, and writes a traceback into the log. And to each
   new one a node hands over, unasked, all records that are close to it, which costs it far more than the caller. Ids
   that are none are refused, and one peer is met under a few ids at most.

They change hivemind's classes in place, because the node creates these objects itself, deep inside `DHTNode.create`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from typing import Any

import hivemind.dht.protocol as dht_protocol
import msgpack
from google.protobuf.message import Message
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from p2ptrain.swarm.limits import Allowance
from p2ptrain.swarm.storage import RECORDS_PER_KEY, BoundedStorage

MAX_EXTENSION_DEPTH = 8
"""Extension types inside extension types; honest records need two."""
MAX_FRAME_BYTES = 256 * 1024 + 4 * 1024
"""One protobuf message in a stream: a piece of a blob or a seal, 256 KiB each, and some slack for the fields around."""
MAX_UNARY_BYTES = 2 * 1024 * 1024
"""One unary request or response, as libp2p's daemon counts it."""
MAX_KEYS_STORED_AT_ONCE = 64
MAX_KEYS_SOUGHT_AT_ONCE = 8
REQUESTS_PER_SECOND, REQUESTS_BURST = 20.0, 100.0
"""To store and to search, of one peer. An honest one, which reads and publishes every 2 s, asks once or twice."""
NODE_ID_BYTES = DHTID.HASH_NBYTES
MET_PER_SECOND, MET_BURST = 1 / 15, 4.0
"""Ids under which one peer is met; a peer that starts again has another one."""

_depth = threading.local()
_installed = threading.Lock()


def _decode_extension(cls: type[MSGPackSerializer], type_code: int, data: bytes) -> Any:
    depth = getattr(_depth, "value", 0)
    if depth >= MAX_EXTENSION_DEPTH:
        raise ValueError(f"msgpack extension types nested deeper than {MAX_EXTENSION_DEPTH}")
    _depth.value = depth + 1
    try:
        if type_code in cls._ext_type_codes:
            return cls._ext_type_codes[type_code].unpackb(data)
        if type_code == cls._TUPLE_EXT_TYPE_CODE:
            return tuple(msgpack.unpackb(data, ext_hook=cls._decode_ext_types, raw=False))
        # hivemind logs a warning here, which would let a stranger fill the log.
        return data
    finally:
        _depth.value = depth


async def _receive_raw_data(reader: Any, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    length = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
    if length > max_bytes:
        raise ValueError(f"a stream frame of {length} bytes, where at most {max_bytes} are allowed")
    return bytes(await reader.readexactly(length))


async def receive_message(kind: type[Message], reader: Any, max_bytes: int | None = None) -> Message | None:
    """One frame as a message of type `kind`; None at the end of what the other side sends.

    Raises ValueError, TypeError, DecodeError for what is no frame or too long a one, IncompleteReadError.
    """
    marker = await reader.readexactly(1)
    if marker not in (P2P.MESSAGE_MARKER, P2P.ERROR_MARKER):
        raise TypeError("no frame")
    data = await _receive_raw_data(reader, max_bytes or MAX_FRAME_BYTES)
    if marker == P2P.ERROR_MARKER:
        return None
    message = kind()
    message.ParseFromString(data)
    return message


def _may_ask(protocol: Any, context: Any) -> bool:
    """Whether a peer may store or search once more; each node counts for itself."""
    if not hasattr(protocol, "allowance"):
        protocol.allowance = Allowance(REQUESTS_PER_SECOND, REQUESTS_BURST)
    return bool(protocol.allowance.take(context.remote_id.to_bytes()))


def _check_sender(request: Any) -> None:
    """Check the id that a caller says its node has. Raises ValueError."""
    if request.peer.node_id and len(request.peer.node_id) != NODE_ID_BYTES:
        raise ValueError("that is no node's id")


@functools.wraps(DHTProtocol.rpc_ping)
async def _rpc_ping(protocol: Any, request: Any, context: Any) -> Any:
    _check_sender(request)
    return await _ping(protocol, request, context)


@functools.wraps(DHTProtocol.update_routing_table)
async def _update_routing_table(protocol: Any, node_id: Any, peer_id: Any, responded: bool = True) -> None:
    if not hasattr(protocol, "meetings"):
        protocol.meetings = Allowance(MET_PER_SECOND, MET_BURST)
    new = responded and node_id is not None and node_id not in protocol.routing_table
    if not new or protocol.meetings.take(peer_id.to_bytes()):
        await _update(protocol, node_id, peer_id, responded)


@functools.wraps(DHTProtocol.rpc_store)
async def _rpc_store(protocol: Any, request: Any, context: Any) -> Any:
    if len(request.keys) > MAX_KEYS_STORED_AT_ONCE or not _may_ask(protocol, context):
        raise ValueError("too many keys at once, or too many requests")
    _check_sender(request)
    return await _store(protocol, request, context)


@functools.wraps(DHTProtocol.rpc_find)
async def _rpc_find(protocol: Any, request: Any, context: Any) -> Any:
    if len(request.keys) > MAX_KEYS_SOUGHT_AT_ONCE or not _may_ask(protocol, context):
        raise ValueError("too many keys at once, or too many requests")
    _check_sender(request)
    return await _find(protocol, request, context)


def _validate_dictionary(protocol: Any, key: bytes, dictionary: Any) -> bool:
    now = get_dht_time()
    for subkey in [subkey for subkey, item in dictionary.data.items() if item.expiration_time <= now]:
        del dictionary[subkey]
    return len(dictionary.data) <= RECORDS_PER_KEY and bool(_validate(protocol, key, dictionary))


_validate = DHTProtocol._validate_dictionary
_ping, _store, _find = DHTProtocol.rpc_ping, DHTProtocol.rpc_store, DHTProtocol.rpc_find
_update = DHTProtocol.update_routing_table


class _OpenCalls(dict[Any, "asyncio.Future[Any]"]):
    """{call id: its future}; a call that has ended already is not in it, though its caller has yet to take it out."""

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)
        return future is not None and not future.done()


async def _ensure_persistent_conn(control: ControlClient) -> None:
    control._pending_calls = _OpenCalls()
    await _connect_to_daemon(control)


_connect_to_daemon = ControlClient._ensure_persistent_conn


def install_guards() -> None:
    """Puts the limits in place and hands hivemind's log to ours. Idempotent; any thread."""
    with _installed:
        if dht_protocol.DHTLocalStorage is BoundedStorage:
            return
        MSGPackSerializer._decode_ext_types = classmethod(_decode_extension)
        P2P.receive_raw_data = staticmethod(_receive_raw_data)
        ControlClient._ensure_persistent_conn = _ensure_persistent_conn
        dht_protocol.DHTLocalStorage = BoundedStorage
        DHTProtocol._validate_dictionary = _validate_dictionary
        DHTProtocol.rpc_ping, DHTProtocol.rpc_store, DHTProtocol.rpc_find = _rpc_ping, _rpc_store, _rpc_find
        DHTProtocol.update_routing_table = _update_routing_table
        use_hivemind_log_handler("nowhere")
        # Its import renames the level for the whole process.
        logging.addLevelName(logging.WARNING, "WARNING")
        if logging.getLogger("hivemind").level == logging.NOTSET:
            # Below errors it reports, with tracebacks, what strangers and the network do all day.
            logging.getLogger("hivemind").setLevel(logging.ERROR)
