"""Calls on a stream socket, frame by frame."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from tests.gpu_worker.calling import Requests
from wire.codec import Array, Assembler
from wire.stream_socket import PREFIX_BYTES, lengths, pack
from wire.v1 import gpu_worker_pb2 as pb

Frame = tuple[pb.ExecuteResponse, bytes]


class Ended(Exception):  # noqa: N818  (a status)
    """The worker ended the stream with a status; None: without one."""

    def __init__(self, number: int | None) -> None:
        super().__init__(number)
        self.code = next((code for code in grpc.StatusCode if code.value[0] == number), None)


class OnSocket:
    """A peer that can say anything."""

    def __init__(self, own: socket.socket) -> None:
        self._socket, self._loop = own, asyncio.get_running_loop()

    async def say(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a worker that has ended the stream takes no more; why is to be heard
            await self._loop.sock_sendall(self._socket, data)

    async def send(self, *requests: pb.ExecuteRequest) -> None:
        for request in requests:
            await self.say(on_wire(request))

    async def hear(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = await self._loop.sock_recv(self._socket, size - len(data))
            except OSError:
                part = b""
            if not part:
                raise Ended(None)
            data += part
        return data

    async def frame(self) -> Frame:
        message, size = lengths(memoryview(await self.hear(PREFIX_BYTES)))
        response = pb.ExecuteResponse.FromString(await self.hear(message))
        if response.ended:
            raise Ended(response.ended)
        return response, await self.hear(size)

    async def answer(self) -> Array:
        response, data = await self.frame()
        assembler = Assembler(response.header)
        assembler.add(data)
        while not assembler.done:
            assembler.add((await self.frame())[1])
        return assembler.array()

    async def call(self, requests: Requests) -> Array:
        await self.send(*requests)
        return await self.answer()

    async def how_it_ends(self) -> grpc.StatusCode | None:
        try:
            while True:
                await self.frame()
        except Ended as ended:
            return ended.code

    def close(self) -> None:
        self._socket.close()

    def say_no_more(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)


def on_wire(request: pb.ExecuteRequest) -> bytes:
    """The request as bytes of a frame."""
    bare, data = pb.ExecuteRequest(), request.data
    bare.CopyFrom(request)
    bare.ClearField("data")
    return pack(bare, len(data)) + data


async def connect(path: str) -> OnSocket:
    own = socket.socket(socket.AF_UNIX)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, path)
    return OnSocket(own)


@asynccontextmanager
async def attached(stub: Any) -> AsyncIterator[OnSocket]:
    """A stream on the socket of `serve`, admitted."""
    peer = await connect(stub.socket)
    try:
        await peer.say((await stub.Attach(pb.AttachRequest())).ticket)
        assert (await peer.frame())[0] == pb.ExecuteResponse()
        yield peer
    finally:
        peer.close()
