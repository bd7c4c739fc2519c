"""gRPC for clients: envelopes and frames in, calls on the service, status codes out. One asyncio thread.

Nothing is computed here. Errors of our tree become their status code with their own text; anything else becomes
INTERNAL with a fixed text. No text of a library and no value reaches a peer or a log.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from functools import partial, wraps
from typing import Any, NoReturn, TypeVar

import grpc

from trusted_worker import attestation
from trusted_worker.config import Settings
from trusted_worker.service import Service
from trusted_worker.session import Event, Session
from wire import channel
from wire.errors import CleaveError, DeniedError, InvalidArgumentError, UnavailableError
from wire.sealing import NoSeal, Seal
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
log = logging.getLogger(__name__)
WATCH_SECONDS = 0.25
COMMAND_SECONDS = 120.0


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

    def __init__(self, service: Service, seal: Seal, session_seconds: float) -> None:
        self._service, self._seal, self._session_seconds = service, seal, session_seconds
        self._expiry: dict[bytes, asyncio.TimerHandle] = {}

    @_mapped
    async def Attest(self, request: pb.AttestRequest, context: Context) -> pb.AttestResponse:
        """Evidence over the client's nonce."""
        return attestation.attest(request.nonce)

    @_mapped
    async def Open(self, request: pb.Sealed, context: Context) -> pb.Sealed:
        """A session, or the reason why not."""
        opened = self._seal.open(request, pb.OpenRequest)
        if not self._service.engine.loaded.done():
            return self._seal.wrap(self._service.open(opened))  # refuses: the model is loading
        response = await self._compute(partial(self._service.open, opened))
        self._expire_later(response.session)
        return self._seal.wrap(response)

    @_mapped
    async def Close(self, request: pb.Sealed, context: Context) -> pb.Sealed:
        """End a session."""
        closed = self._seal.open(request, pb.CloseRequest)
        self._keep(closed.session)
        await self._compute(partial(self._service.close, closed.session))
        return self._seal.wrap(pb.CloseResponse())

    @_mapped
    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        """Counters; they need no turn of the compute thread."""
        return self._service.stats()

    async def Decode(self, requests: AsyncIterator[pb.Sealed], context: Context) -> AsyncIterator[pb.Sealed]:
        """Frames in, tokens out, over any number of turns of one session."""
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        reader = asyncio.create_task(self._read(requests, emit, events))
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, CleaveError):
                    await _abort(context, event)
                yield self._seal.wrap(event)
        finally:
            reader.cancel()

    async def _read(
        self, requests: AsyncIterator[pb.Sealed], emit: Callable[[Event], None], events: "asyncio.Queue[Event | None]"
    ) -> None:
        """Feed the session from the client's frames. The first frame names it; the others must agree."""
        name, session = b"", None
        try:
            async for sealed in requests:
                frame = self._seal.open(sealed, pb.DecodeRequest)
                if session is None:
                    name, session = frame.session, self._service.session(frame.session)
                    self._keep(name)
                    await self._compute(partial(session.attach, emit))
                if frame.session != name:
                    raise InvalidArgumentError("a stream belongs to one session")
                await self._compute(partial(session.feed, list(frame.token_ids), frame.credit, frame.end_turn))
            events.put_nowait(None)
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

    def _detach(self, name: bytes, session: Session, emit: Callable[[Event], None]) -> None:
        loop = asyncio.get_running_loop()

        def leave() -> None:
            if session.detach(emit):
                loop.call_soon_threadsafe(self._expire_later, name)

        self._service.engine.submit(leave)

    def _expire_later(self, name: bytes) -> None:
        """Free the session after a while, unless a client comes back for it."""
        self._keep(name)
        self._expiry[name] = asyncio.get_running_loop().call_later(self._session_seconds, self._expire, name)

    def _expire(self, name: bytes) -> None:
        self._keep(name)
        self._service.engine.submit(partial(self._service.expire, name))

    def _keep(self, name: bytes) -> None:
        handle = self._expiry.pop(name, None)
        if handle is not None:
            handle.cancel()

    async def _compute(self, work: Callable[[], T]) -> T:
        future: Future[T] = self._service.engine.submit(work)
        return await asyncio.wait_for(asyncio.wrap_future(future), COMMAND_SECONDS)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises CleaveError when the model or the address cannot be used."""
    for address in filter(None, (settings.listen, settings.gpu_worker)):
        if not channel.is_local(address) and not settings.insecure_plaintext:
            raise DeniedError(
                f"{address} is not on this machine and nothing is encrypted yet: "
                "use loopback or a Unix socket, or say --insecure-plaintext"
            )
    asyncio.run(_serve(Service(settings), settings))


def _announce(loading: "asyncio.Future[None]", stopping: asyncio.Event) -> None:
    """Say that the model is loaded; stop when it could not be."""
    if loading.cancelled() or loading.exception() is not None:
        stopping.set()
    else:
        print("serving", flush=True)


async def _serve(service: Service, settings: Settings) -> None:
    server = grpc.aio.server(options=channel.server_options())
    servicer = TrustedWorker(service, NoSeal(), settings.session_seconds)
    trusted_worker_pb2_grpc.add_TrustedWorkerServiceServicer_to_server(servicer, server)
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError:
        raise UnavailableError(f"cannot listen on {settings.listen}: is the address in use?") from None
    await server.start()
    unix = settings.listen.startswith("unix:")
    print("listening on", settings.listen if unix else f"{settings.listen.rpartition(':')[0]}:{port}", flush=True)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    service.engine.start()
    try:
        loading = asyncio.wrap_future(service.engine.loaded)
        loading.add_done_callback(lambda done: _announce(done, stopping))
        while not stopping.is_set():
            service.worker.expire()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), WATCH_SECONDS)
        if loading.done():
            loading.result()
    finally:
        service.engine.stop()
        await server.stop(grace=1.0)
