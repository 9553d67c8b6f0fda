"""A caller that the run's list does not have gets one refusal from every call, and nothing is looked at for it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from p2ptrain.calls.messages import (
    NOT_LISTED,
    REVOKED,
    STATEMENTS_MAX_BYTES,
    TOO_MANY_CALLS,
    Amend,
    Answer,
    CallError,
    Hello,
    Tip,
    Traffic,
    Welcome,
    decode_message,
)
from p2ptrain.calls.servicer import OUTSIDERS_AMENDS_BURST, PeerServicer
from p2ptrain.chain.admission import Revocation
from p2ptrain.config.manifest import PROTOCOL_VERSION

RUN_ID = bytes(range(32))
LISTED, OUTSIDER, REVOKED_PEER = b"listed", b"outsider", b"r" * 38
REVOCATION = Revocation(RUN_ID, REVOKED_PEER, False, bytes(64))
CALLS = [name for name in dir(PeerServicer) if name.startswith("rpc_")]


class ListedOnly:
    """Of a peer only what says who may call, and its welcome: whatever else is asked for is an error."""

    def admits(self, peer: bytes) -> bool:
        return peer == LISTED

    def revocation(self, peer: bytes) -> Revocation | None:
        return REVOCATION if peer == REVOKED_PEER else None

    def take_statements(self, amend: Amend) -> str:
        raise AssertionError("statements are not what the request has")

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
        "dial",
        "join",
        "contribute",
        "follow",
        "relay",
        "amend",
        "rounds",
        "seals",
        "snapshot",
        "file",
        "audit",
        "prove",
    }


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("rpc_hello", "rpc_amend")])
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


def test_a_peer_that_was_revoked_is_shown_the_owners_word() -> None:
    (answer,) = asyncio.run(answers("rpc_hello", REVOKED_PEER))
    assert decode_message(answer, Welcome) == Welcome(PROTOCOL_VERSION, RUN_ID, b"", None, REVOKED, REVOCATION)


def test_statements_of_outsiders_are_read_and_no_more_of_them_than_signatures_can_be_checked() -> None:
    class Counting(ListedOnly):
        heard = 0

        def take_statements(self, amend: Amend) -> str:
            self.heard += 1
            return ""

    async def scenario() -> None:
        answering: Any = Counting()
        servicer = PeerServicer(answering, Traffic())
        request = Traffic().message(Amend(RUN_ID, (REVOCATION,)))
        said = [
            decode_message((await servicer.rpc_amend(request, context(number.to_bytes(38)))).value, Answer).refusal
            for number in range(300)
        ]
        assert OUTSIDERS_AMENDS_BURST <= answering.heard <= OUTSIDERS_AMENDS_BURST + 50
        assert said.count("") == answering.heard and set(said) == {"", TOO_MANY_CALLS}
        # A peer of the run is heard all the same.
        heard = answering.heard
        await servicer.rpc_amend(request, context(LISTED))
        assert answering.heard == heard + 1
        # What is too long is not read, and noise is none of ours.
        long = BytesValue(value=bytes(STATEMENTS_MAX_BYTES + 1))
        await servicer.rpc_amend(long, context(LISTED))
        with pytest.raises(CallError):
            await servicer.rpc_amend(BytesValue(value=b"noise"), context(LISTED))
        assert answering.heard == heard + 1

    asyncio.run(scenario())
