"""Who may use the stream socket: whoever shows a ticket that Attach gave out. The asyncio thread.

What is seen: connections of anybody who can reach the socket. What is learnt: whether a ticket is good. What breaks
it: somebody who reads the ticket where gRPC is not encrypted, and is faster.

(1) A ticket is 32 random bytes, given over gRPC under whatever authentication that has.
(2) It is good for TICKET_SECONDS and for one connection, whatever comes of that one.
(3) There are at most MAX_STREAMS tickets, and as many connections that have shown none yet, for SHOW_SECONDS each.
(4) A stream here is a stream of Traffic: counted and refused like one over gRPC.
"""

import asyncio
import contextlib
import secrets
import socket
import time
from typing import TYPE_CHECKING

from gpu_worker.compute import Compute
from gpu_worker.conversation import Conversation
from gpu_worker.traffic import MAX_STREAMS, Traffic
from wire import stream_socket
from wire.errors import CleaveError, DeadlineError, ExhaustedError, UnauthenticatedError, UnavailableError
from wire.v1 import gpu_worker_pb2 as pb

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

TICKET_SECONDS = 10.0
SHOW_SECONDS = 5.0
PAUSE_SECONDS = 0.1  # after an error of accept: no file descriptors are left


class StreamPlane:
    """Listens from the start until `stop`. Raises PreconditionError where it cannot."""

    def __init__(
        self, address: str, compute: Compute, ring_only: bool, traffic: Traffic, request_seconds: float
    ) -> None:
        self._address, self._listener = address, stream_socket.listen(address)
        self._compute, self._ring_only, self._traffic = compute, ring_only, traffic
        self._request_seconds = request_seconds
        self._tickets: dict[bytes, float] = {}
        self._strangers = asyncio.Semaphore(MAX_STREAMS)
        self._tasks = {asyncio.create_task(self._accept())}

    def issue(self) -> bytes:
        """Steps (1) to (3). Raises UnavailableError when draining, ExhaustedError for too many tickets."""
        if self._traffic.draining:
            raise UnavailableError("draining: this worker ends soon")
        now = time.monotonic()
        self._tickets = {ticket: until for ticket, until in self._tickets.items() if until > now}
        if len(self._tickets) >= MAX_STREAMS:
            raise ExhaustedError(f"{MAX_STREAMS} tickets are out; one that is not used ends after {TICKET_SECONDS:g} s")
        ticket = secrets.token_bytes(stream_socket.TICKET_BYTES)
        self._tickets[ticket] = now + TICKET_SECONDS
        return ticket

    async def stop(self) -> None:
        """Take no more connections and end those that are left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        stream_socket.remove(self._address)

    async def _accept(self) -> None:
        while True:
            await self._strangers.acquire()
            try:
                peer, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            except OSError:
                self._strangers.release()
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            task = asyncio.create_task(self._serve(peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: socket.socket) -> None:
        """One connection, to its end."""
        try:
            try:
                await self._admit(peer)
            finally:
                self._strangers.release()
            with self._traffic.stream():
                worker = await self._compute.worker()
                peer.send(stream_socket.pack(pb.ExecuteResponse()))  # it is welcome
                await self._converse(peer, worker)
        except OSError:  # the peer left
            return
        except Exception as error:
            self._traffic.grpc.refused += 1
            code = error.code if isinstance(error, CleaveError) else CleaveError.code
            with contextlib.suppress(OSError):
                peer.send(stream_socket.pack(pb.ExecuteResponse(ended=code.value[0])))
        finally:
            peer.close()

    async def _admit(self, peer: socket.socket) -> None:
        """Step (2). Raises UnauthenticatedError, the same for unknown, used and late; DeadlineError."""
        ticket = bytearray()
        try:
            async with asyncio.timeout(SHOW_SECONDS):
                while len(ticket) < stream_socket.TICKET_BYTES:
                    missing = stream_socket.TICKET_BYTES - len(ticket)
                    part = await asyncio.get_running_loop().sock_recv(peer, missing)
                    if not part:
                        raise UnauthenticatedError("no ticket came")
                    ticket += part
        except TimeoutError:
            raise DeadlineError("no ticket came") from None
        if self._tickets.pop(bytes(ticket), 0.0) < time.monotonic():
            raise UnauthenticatedError("this ticket is not good: ask for another one")

    async def _converse(self, peer: socket.socket, worker: "Worker") -> None:
        """Until the compute thread is through with it. Cancelled: until it has noticed that nothing more comes."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # the asyncio thread is gone already
                loop.call_soon_threadsafe(ended.set)

        def attend() -> None:
            own = peer.dup()  # closed there, while this one may be shut down here
            stream_socket.widen(own)
            self._compute.attend(Conversation(own, worker, self._ring_only, self._traffic, self._request_seconds, end))

        try:
            await asyncio.wrap_future(self._compute.submit(attend))
            await ended.wait()
        finally:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
