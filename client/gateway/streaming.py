"""Answers over HTTP: whole, or as server-sent events. A client that goes away cancels its answer either way.

A stream begins when there is something to send, so that what fails before that has a status of its own. After that an
error is the last event: OpenAI's clients raise it, and no [DONE] follows. While nothing comes, a comment is sent now
and then, so that nobody on the way takes the connection for dead.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from client.gateway.errors import api_error
from client.gateway.generation import End, Event, Events, Piece
from client.gateway.shapes import Shape

T = TypeVar("T")

_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"


async def whole(request: Request, events: Events, shape: Shape) -> Response:
    """The answer as one JSON object. Raises CleaveError."""

    async def collect() -> dict[str, Any]:
        pieces: list[Piece] = []
        async for event in events:
            if isinstance(event, End):
                return shape.whole(pieces, event)
            if event:
                pieces.append(event)
        raise ClientDisconnect

    try:
        return JSONResponse(await _while_there(request, collect()))
    finally:
        await events.aclose()


async def stream(request: Request, events: Events, shape: Shape) -> Response:
    """The answer as events. Raises CleaveError for what fails before the first one."""
    try:
        first = await _while_there(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return _EventStream(_lines(first, events, shape), events)


class _EventStream(StreamingResponse):
    """Closes its events however it ends, also when nobody reads a line."""

    def __init__(self, lines: AsyncIterator[bytes], events: Events) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=_HEADERS)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _lines(first: Event | None, events: Events, shape: Shape) -> AsyncIterator[bytes]:
    for chunk in shape.first():
        yield _data(chunk)
    try:
        for line in _of(first, shape):
            yield line
        async for event in events:
            for line in _of(event, shape):
                yield line
        yield _DONE
    except Exception as error:
        yield _data(api_error(error).body)


def _of(event: Event | None, shape: Shape) -> list[bytes]:
    if event is None:
        return [_KEEP_ALIVE]
    return list(map(_data, shape.last(event))) if isinstance(event, End) else [_data(shape.piece(event))]


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _while_there(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; it is cancelled, and ClientDisconnect raised, when the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
