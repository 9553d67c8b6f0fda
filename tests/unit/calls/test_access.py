"""A caller that the run's list does not have gets one refusal from every call, and nothing is looked at for it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from p2ptrain.calls.messages import NOT_LISTED, Answer, Hello, Tip, Traffic, Welcome, decode_message
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.config.manifest import PROTOCOL_VERSION

RUN_ID = bytes(range(32))
LISTED, OUTSIDER = b"listed", b"outsider"
CALLS = [name for name in dir(PeerServicer) if name.startswith("rpc_")]


class ListedOnly:
    """Of a peer only what says who may call, and its welcome: whatever else is asked for is an error."""

    def admits(self, peer: bytes) -> bool:
        return peer == LISTED

    def welcome(self) -> Welcome:
        return Welcome(PROTOCOL_VERSION, RUN_ID, b"the manifest", Tip(7, RUN_ID, 7), "")


def context(peer: bytes) -> Any:
    return SimpleNamespace(remote_id=SimpleNamespace(to_bytes=lambda: peer))


async def never_read() -> AsyncIterator[BytesValue]:
    raise AssertionError("the request was read")
    yield


async def answers(name: str, peer: bytes) -> list[bytes]:
    """All that a call whose request is noise is answered with."""
    answering: Any = ListedOnly()
    method = getattr(PeerServicer(answering, Traffic()), name)
    if not inspect.isasyncgenfunction(getattr(PeerServicer, name)):
        return [(await method(BytesValue(value=b"noise"), context(peer))).value]
    request = never_read() if name in ("rpc_contribute", "rpc_prove") else BytesValue(value=b"noise")
    return [frame.value async for frame in method(request, context(peer))]


def test_the_calls_are_those_of_the_protocol() -> None:
    assert {name[4:] for name in CALLS} == {
        "hello",
        "join",
        "contribute",
        "follow",
        "relay",
        "rounds",
        "snapshot",
        "data",
        "audit",
        "prove",
    }


@pytest.mark.parametrize("name", [name for name in CALLS if name != "rpc_hello"])
def test_a_call_of_an_outsider_is_answered_with_the_refusal_alone(name: str) -> None:
    (answer,) = asyncio.run(answers(name, OUTSIDER))
    assert decode_message(answer, Answer) == Answer(NOT_LISTED)


def test_an_outsider_that_says_hello_learns_which_run_it_is_and_that_it_is_closed() -> None:
    (answer,) = asyncio.run(answers("rpc_hello", OUTSIDER))
    assert decode_message(answer, Welcome) == Welcome(PROTOCOL_VERSION, RUN_ID, b"", None, NOT_LISTED)


def test_a_listed_peer_that_says_hello_gets_the_manifest() -> None:
    async def scenario() -> None:
        answering: Any = ListedOnly()
        request = Traffic().message(Hello(PROTOCOL_VERSION))
        answer = await PeerServicer(answering, Traffic()).rpc_hello(request, context(LISTED))
        assert decode_message(answer.value, Welcome) == answering.welcome()

    asyncio.run(scenario())
