"""gRPC for clients: sealed frames in, calls on the service, sealed frames or a status code out. One asyncio thread.

Nothing is computed here. Errors of our tree become their status code with their own text; anything else becomes
INTERNAL with a fixed text. No text of a library and no value reaches a peer or a log.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from functools import partial, wraps
from typing import Any, NoReturn, TypeVar

import grpc

from trusted_worker.adapters import Adapter, Incoming
from trusted_worker.attestation import Attestor
from trusted_worker.config import Settings
from trusted_worker.service import Service
from trusted_worker.session import Event, Session
from wire.errors import CleaveError, DeadlineError, SealError
from wire.sealing import Receiver, WorkerCall
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

MAX_BACKLOG = 1 << 20  # bytes of embeddings of one session that wait for a step
POLL_SECONDS = 0.005

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
log = logging.getLogger(__name__)


async def _abort(context: Context, error: BaseException) -> NoReturn:
    if isinstance(error, CleaveError):
        await context.abort(error.code, str(error))
    log.error("internal error: %s", type(error).__name__)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error")


def _mapped(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """A unary method whose errors become a status."""

    @wraps(method)
    async def call(self: Any, request: Any, context: Context) -> T:
        try:
            return await method(self, request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except BaseException as error:
            await _abort(context, error)

    return call


class TrustedWorker(trusted_worker_pb2_grpc.TrustedWorkerServiceServicer):
    """The servicer."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self._service, self._settings = service, settings
        self._receiver = Receiver()
        self._attestor = Attestor(settings, lambda: self._receiver.public_key, service.claims)
        self._expiry: dict[bytes, asyncio.TimerHandle] = {}

    @_mapped
    async def Attest(self, request: pb.AttestRequest, context: Context) -> pb.AttestResponse:
        """Evidence over the client's nonce."""
        return await self._attestor.attest(request)

    @_mapped
    async def Open(self, request: pb.Sealed, context: Context) -> pb.Sealed:
        """A session, or the reason why not."""
        call, opened = self._receiver.accept(request, "Open", pb.OpenRequest)
        if not self._service.engine.loaded.done():
            return call.wrap(self._service.open(opened, call.secret))  # refuses: the model is loading
        future = self._service.engine.submit(partial(self._service.open, opened, call.secret))
        try:
            response = await self._result(future, self._settings.allocation_seconds)
        except BaseException:  # the client has left, or waited too long: nobody knows the session's name
            future.add_done_callback(self._abandon)
            raise
        self._expire_later(response.session)
        return call.wrap(response)

    @_mapped
    async def Close(self, request: pb.Sealed, context: Context) -> pb.Sealed:
        """End a session."""
        call, _ = self._receiver.accept(request, "Close", pb.CloseRequest, self._secret)
        self._keep(request.session)
        await self._compute(partial(self._service.close, request.session))
        return call.wrap(pb.CloseResponse())

    @_mapped
    async def Upload(self, requests: AsyncIterator[pb.Sealed], context: Context) -> pb.Sealed:
        """A LoRA adapter, in pieces; the last one completes it. Its memory is taken at once, so there is a deadline."""
        call, first = self._receiver.accept(await self._next(requests), "Upload", pb.UploadRequest)
        future = self._service.engine.submit(partial(self._service.begin_upload, first.config, first.weights_size))
        try:
            incoming = await self._result(future, self._settings.allocation_seconds)
            async with asyncio.timeout(self._settings.session_seconds):
                adapter = await self._receive(incoming, call, first, requests)
        except BaseException as error:
            future.add_done_callback(self._abandon_upload)
            if isinstance(error, TimeoutError):
                raise DeadlineError("the upload took too long") from None
            raise
        return call.wrap(pb.UploadResponse(adapter=adapter.name, size=adapter.size))

    async def _receive(
        self, incoming: Incoming, call: WorkerCall, piece: pb.UploadRequest, requests: AsyncIterator[pb.Sealed]
    ) -> Adapter:
        await self._compute(partial(incoming.write, piece.weights))
        while not incoming.complete:
            piece = call.open(await self._next(requests), pb.UploadRequest)
            await self._compute(partial(incoming.write, piece.weights))
        return await self._compute(incoming.finish)

    @_mapped
    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        """Counters; they need no turn of the compute thread."""
        return self._service.stats()

    async def Decode(self, requests: AsyncIterator[pb.Sealed], context: Context) -> AsyncIterator[pb.Sealed]:
        """Frames in, tokens out, over any number of turns of one session."""
        events: asyncio.Queue[Event | WorkerCall | None] = asyncio.Queue()  # first the call that seals the others
        reader = asyncio.create_task(self._read(requests, events))
        call: WorkerCall | None = None
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, CleaveError):
                    await _abort(context, event)
                elif isinstance(event, WorkerCall):
                    call = event
                elif call is not None:
                    yield call.wrap(event)
        finally:
            reader.cancel()

    async def _read(
        self, requests: AsyncIterator[pb.Sealed], events: "asyncio.Queue[Event | WorkerCall | None]"
    ) -> None:
        """Feed the session from the client's frames. The first one names it."""
        loop = asyncio.get_running_loop()
        name, session = b"", None

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            first = await self._next(requests)
            call, frame = self._receiver.accept(first, "Decode", pb.DecodeRequest, self._secret)
            name, session = first.session, self._service.session(first.session)
            self._keep(name)
            events.put_nowait(call)
            await self._compute(partial(session.attach, emit))
            await self._feed(session, frame)
            async for sealed in requests:
                await self._feed(session, call.open(sealed, pb.DecodeRequest))
            events.put_nowait(None)
        except SealError as error:  # somebody is between us and the client: what it sent is not known
            self._service.engine.submit(partial(self._service.close, name))
            events.put_nowait(error)
        except CleaveError as error:
            events.put_nowait(error)
        except grpc.aio.AbortError:
            return  # Decode has told the client; nobody awaits this task
        except Exception as error:
            log.error("internal error in a stream: %s", type(error).__name__)
            events.put_nowait(CleaveError("internal error"))
        finally:
            if session is not None:
                self._detach(name, session, emit)

    async def _feed(self, session: Session, frame: pb.DecodeRequest) -> None:
        await self._compute(partial(session.feed, frame.token_ids, frame.credit, frame.end_turn, frame.embeddings))
        while session.backlog > MAX_BACKLOG and not session.dead:  # the client waits: no more frames are read
            await asyncio.sleep(POLL_SECONDS)

    async def _next(self, requests: AsyncIterator[pb.Sealed]) -> pb.Sealed:
        """A frame that is due. There is a deadline for it; after the last one comes an empty one, which never opens."""
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                return await anext(requests, pb.Sealed())
        except TimeoutError:
            raise DeadlineError("a frame is due, and none came") from None

    def _secret(self, session: bytes) -> bytes:
        """Of a session. Raises UnauthenticatedError when there is none of that name."""
        return self._service.session(session).secret

    def _detach(self, name: bytes, session: Session, emit: Callable[[Event], None]) -> None:
        loop = asyncio.get_running_loop()

        def leave() -> None:
            if session.detach(emit):
                loop.call_soon_threadsafe(self._expire_later, name)

        self._service.engine.submit(leave)

    def _expire_later(self, name: bytes) -> None:
        """Free the session after a while, unless a client comes back for it."""
        self._keep(name)
        self._expiry[name] = asyncio.get_running_loop().call_later(self._settings.session_seconds, self._expire, name)

    def _expire(self, name: bytes) -> None:
        self._keep(name)
        self._service.engine.submit(partial(self._service.expire, name))

    def _keep(self, name: bytes) -> None:
        handle = self._expiry.pop(name, None)
        if handle is not None:
            handle.cancel()

    def _abandon(self, opened: "Future[pb.OpenResponse]") -> None:
        """Close a session that was opened for nobody. Runs in whichever thread completes the future."""
        if not opened.cancelled() and opened.exception() is None:
            self._service.engine.submit(partial(self._service.close, opened.result().session))

    def _abandon_upload(self, begun: "Future[Incoming]") -> None:
        """Nobody waits for it any more. Runs in whichever thread completes the future."""
        if not begun.cancelled() and begun.exception() is None:
            self._service.engine.submit(begun.result().abandon)

    async def _compute(self, work: Callable[[], T]) -> T:
        """`work` in the compute thread, unless its turn does not come in time: then it never runs."""
        return await self._result(self._service.engine.submit(work), self._settings.request_seconds)

    async def _result(self, future: "Future[T]", seconds: float) -> T:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except TimeoutError:
            raise DeadlineError("the trusted worker is busy: try again") from None
