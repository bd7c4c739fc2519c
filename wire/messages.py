"""Requests that are no message are INVALID_ARGUMENT, on both services.

grpc.aio parses a request before any code of ours runs, and answers UNKNOWN or INTERNAL, with a library's text, where it
cannot. So this interceptor takes the bytes and parses them itself.
"""

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from wire.errors import InvalidArgumentError

MALFORMED = "malformed message"


class Parser(grpc.aio.ServerInterceptor):
    """For `grpc.aio.server(interceptors=[Parser()])`. A stream's iterator raises InvalidArgumentError."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The method's handler, over bytes."""
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        if handler.stream_stream:
            behaviour = _streaming(handler.stream_stream, handler.request_deserializer)
            return grpc.stream_stream_rpc_method_handler(behaviour, None, handler.response_serializer)
        if handler.stream_unary:
            behaviour = _streaming(handler.stream_unary, handler.request_deserializer)
            return grpc.stream_unary_rpc_method_handler(behaviour, None, handler.response_serializer)
        if handler.unary_unary:
            behaviour = _unary(handler.unary_unary, handler.request_deserializer)
            return grpc.unary_unary_rpc_method_handler(behaviour, None, handler.response_serializer)
        return handler


def _unary(method: Callable[..., Any], parse: Callable[[bytes], Any]) -> Callable[..., Any]:
    async def call(data: bytes, context: Any) -> Any:
        try:
            request = parse(data)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED)
        return await method(request, context)

    return call


def _streaming(method: Callable[..., Any], parse: Callable[[bytes], Any]) -> Callable[..., Any]:
    async def parsed(frames: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in frames:
            try:
                request = parse(data)
            except DecodeError:
                raise InvalidArgumentError(MALFORMED) from None
            yield request

    async def generate(frames: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        async for answer in method(parsed(frames), context):
            yield answer

    async def call(frames: AsyncIterator[bytes], context: Any) -> Any:
        return await method(parsed(frames), context)

    return generate if inspect.isasyncgenfunction(method) else call
