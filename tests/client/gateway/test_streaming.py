"""Server-sent events out of a scripted answer: silence, errors, and clients that are gone."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from client.attestation.policy import Offer, Policy, verify
from client.gateway import generation, requests, streaming
from client.gateway.generation import End, Events, Piece
from client.gateway.shapes import ChatShape
from client.session import Request as Opening
from tests.client.gateway.stand import asked
from wire.errors import ExhaustedError, UnavailableError

PEER = verify("127.0.0.1:7", "none", Policy(), Offer(b"n" * 32, b"", b"k" * 32, b"{}"), datetime.now(UTC))
END = End((), "eos", 3, 2, 5, 0.2, 0.1, PEER)


class Script:
    """Events that come one after the other; an exception among them is raised. `closed` says that nobody listens."""

    def __init__(self, *events: Any, forever: bool = False) -> None:
        self._script, self._forever = events, forever
        self.closed = False

    async def events(self) -> Events:
        try:
            for event in self._script:
                if isinstance(event, Exception):
                    raise event
                yield event
            while self._forever:
                await asyncio.sleep(1)
        finally:
            self.closed = True


async def answered(
    script: Script, *, stream: bool = True, leave_after: int | None = None, stuck: bool = False
) -> list[Any]:
    """The ASGI messages of an answer, whose events are closed then. The client is gone after `leave_after` messages.

    `stuck`: until then it takes nothing more.
    """
    sent: list[Any] = []
    gone = asyncio.Event()
    if leave_after == 0:
        gone.set()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            gone.set()
            await asyncio.sleep(60 if stuck else 0)

    scope: Any = {"type": "http", "method": "POST", "headers": [], "asgi": {"spec_version": "2.3"}}
    order = requests.chat({"messages": asked("x"), "stream": stream}, Opening("demo", "secure-infer", "int8"))
    make = streaming.stream if stream else streaming.whole
    try:
        response = await make(Request(scope, receive), script.events(), ChatShape(order, str))
        await response(scope, receive, send)
    finally:
        assert script.closed  # here: the end of the loop closes everything
    return sent


def lines(sent: list[Any]) -> list[str]:
    return b"".join(message.get("body", b"") for message in sent).decode().strip().split("\n\n")


def test_silence_is_filled_with_comments() -> None:
    script = Script(None, Piece("a", ()), None, None, END)
    said = lines(asyncio.run(answered(script)))
    assert [line.partition(":")[0] for line in said] == ["data", "", "data", "", "", "data", "data"]
    assert said[-1] == "data: [DONE]"


def test_the_event_loop_says_when_nothing_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "TICK_SECONDS", 0.01)
    assert asyncio.run(generation._next(asyncio.Queue())) is None


def test_an_error_before_the_first_event_is_raised() -> None:
    for stream in (True, False):
        script = Script(ExhaustedError("no memory"))
        with pytest.raises(ExhaustedError):
            asyncio.run(answered(script, stream=stream))


@pytest.mark.parametrize(
    ("error", "code"), [(UnavailableError("gone"), "trusted_worker_lost"), (KeyError("a prompt"), "internal_error")]
)
def test_an_error_later_is_the_last_event(error: Exception, code: str) -> None:
    script = Script(Piece("a", ()), error)
    said = lines(asyncio.run(answered(script)))
    assert json.loads(said[-1].removeprefix("data: "))["error"]["code"] == code
    assert "a prompt" not in said[-1]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_client_that_leaves_a_stream_closes_its_events(after: int) -> None:
    script = Script(Piece("a", ()), forever=True)
    asyncio.run(asyncio.wait_for(answered(script, leave_after=after), 30))


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_answer_that_nobody_takes_is_closed(after: int) -> None:
    script = Script(Piece("a", ()), forever=True)
    asyncio.run(asyncio.wait_for(answered(script, leave_after=after, stuck=True), 30))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_anything_came_closes_them_too(stream: bool) -> None:
    script = Script(forever=True)
    with pytest.raises(ClientDisconnect):
        asyncio.run(asyncio.wait_for(answered(script, stream=stream, leave_after=0), 30))
