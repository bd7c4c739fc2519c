"""The routes: OpenAI's API over one verified connection, and what tells how the gateway is doing.

    POST /v1/chat/completions, /v1/completions       answers, whole or streamed
    GET  /v1/models, /v1/models/NAME                 the one model
    GET  /v1/attestation/report                      evidence, verdict, policy; always
    GET  /v1/exposure                                what the GPU worker sees; always, where it is recorded
    GET  /health, /ready, /metrics                   alive; verified; Prometheus
    GET  /, /page/NAME                               the web page

Every path below /v1/ but these two is 503, with the step that failed, while the trusted worker is not verified: the
body of the request is not even read then. Nothing of a request or an answer is logged.
"""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from client.gateway import requests, static, streaming
from client.gateway.errors import INVALID, ApiError, api_error
from client.gateway.exposure import Exposure
from client.gateway.generation import End, Events, Generations, Model
from client.gateway.link import Link
from client.gateway.metrics import Metrics
from client.gateway.report import report
from client.gateway.shapes import ChatShape, CompletionShape, Shape
from client.session import Request as Opening
from wire.errors import CleaveError
from wire.metrics import CONTENT_TYPE

MAX_BODY_BYTES = 8 << 20
MAX_DISCARDED_BYTES = 64 << 20
Parse = Callable[[Any, Opening], requests.Order]


@dataclass
class Gateway:
    """What the endpoints share."""

    link: Link
    generations: Generations
    model: Model
    exposure: Exposure
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/attestation/report", self._report),
            Route("/v1/exposure", self._exposure),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            *static.routes(),
        ]
        told = dict.fromkeys((ApiError, CleaveError, Exception), _error)
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_route, **told})

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, requests.chat, ChatShape)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, requests.completion, CompletionShape)

    async def _answer(self, request: Request, parse: Parse, shape: type[Shape]) -> Response:
        self.metrics.requests += 1
        try:
            order = await self._order(request, parse)
            send = streaming.stream if order.stream else streaming.whole
            return await send(request, self._counted(order), shape(order, self.model.tokenizer.spelling))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    async def _order(self, request: Request, parse: Parse) -> requests.Order:
        """What is wanted. Raises NotVerifiedError before anything is read, ApiError."""
        try:
            await self.link.worker()
            return parse(await _json(request), self.model.base)
        except (ApiError, CleaveError):
            self.metrics.errors += 1
            raise
        except ClientDisconnect:
            self.metrics.cancelled += 1
            raise

    async def _counted(self, order: requests.Order) -> Events:
        """The events of an answer, with its part in the metrics."""
        started, open_ended, trail = time.monotonic(), True, None
        try:
            async with aclosing(self.generations.events(order)) as events:
                async for event in events:
                    if event:
                        trail = trail or self.exposure.begin(order)
                        trail.add(event)
                    if isinstance(event, End):
                        self.metrics.ended(event, started)
                        open_ended = False
                    yield event
        except CleaveError:
            self.metrics.errors += 1
            open_ended = False
            raise
        finally:
            self.metrics.cancelled += open_ended

    async def _models(self, _: Request) -> Response:
        await self.link.worker()
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        await self.link.worker()
        if request.path_params["name"] != self.model.base.model:
            told = f"there is no such model: this gateway serves {self.model.base.model!r}"
            raise ApiError(404, told, INVALID, "model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        """`max_model_len` is vLLM's name for the context."""
        card = {"id": self.model.base.model, "object": "model", "created": self.started, "owned_by": "cleave"}
        return card | {"max_model_len": self.model.context}

    async def _report(self, _: Request) -> Response:
        base = self.model.base
        return JSONResponse(report(self.link) | {"scheme": base.scheme, "precision": base.precision})

    async def _exposure(self, _: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self.exposure.read))

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        failure = self.link.failure
        if self.link.ready:
            return JSONResponse({"ready": True})
        step = {"number": failure.number, "field": failure.field} if failure else None
        told = failure.text if failure else "the trusted worker is being verified"
        return JSONResponse({"ready": False, "step": step, "message": told}, 503)

    async def _metrics(self, _: Request) -> Response:
        text = self.metrics.text(self.link, self.generations, self.model.base.scheme)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)


async def _json(request: Request) -> Any:
    """The body. Raises ApiError when it is too long, or no JSON."""
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY_BYTES:
            body += part
        elif size > MAX_DISCARDED_BYTES:
            break
    if size > MAX_BODY_BYTES:  # said when the client has sent it all: many do not listen before
        raise ApiError(413, f"the request has more than {MAX_BODY_BYTES} bytes", INVALID, "request_too_large")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", INVALID, "invalid_json") from None


async def _error(_: Request, error: Exception) -> Response:
    told = api_error(error)
    return JSONResponse(told.body, told.status, told.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = "there is no such path" if status == 404 else f"{request.method} does not go with this path"
    told = ApiError(status, what, INVALID, "not_found" if status == 404 else "wrong_method")
    told.headers = dict(getattr(error, "headers", None) or {})  # Allow
    return await _error(request, told)
