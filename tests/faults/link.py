"""A network between two processes that a test may hold or cut: bytes over loopback TCP to a Unix socket and back."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TypeVar

_CHUNK = 1 << 16
_STOP_SECONDS = 10.0
T = TypeVar("T")


class Link:
    """Listens at `target` (near) and passes every connection on to a worker's socket (far), in a thread of its own."""

    def __init__(self, forward: str) -> None:
        self.target = ""
        self.held = 0  # bytes of the near side that have not gone on
        self.recorded: bytearray | None = None  # what the near side sent, when this is not None
        self._forward = forward.removeprefix("unix:")
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._cut = False
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(_STOP_SECONDS)

    def hold(self) -> None:
        """From now on nothing of the near side gets through; `held` counts it."""
        self._do(self._open.clear)

    def release(self) -> None:
        """What was held goes on, and so does the rest."""
        self._do(self._open.set)

    def cut(self) -> None:
        """Reset every connection, in both directions, and every one that is tried before `restore`."""
        self._do(self._reset)

    def restore(self) -> None:
        """Connections can be made again."""
        self._do(self._mend)

    @property
    def connections(self) -> int:
        """Ends of connections that are open; two for each."""
        return len(self._writers)

    def close(self) -> None:
        """Reset everything and end the thread."""
        self._do(self._reset)
        self._do(self._server.close)
        self._do(lambda: None)  # what was cancelled has had its turn
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _accept(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        if self._cut:
            back.transport.abort()
            return
        try:
            far, forth = await asyncio.open_unix_connection(self._forward)
        except OSError:  # nobody listens there
            back.transport.abort()
            return
        ends = {back, forth}
        self._writers |= ends
        sent: asyncio.Queue[bytes] = asyncio.Queue()
        self._run(self._collect(near, sent))
        self._run(self._pump(lambda: self._held(sent), forth, ends))
        self._run(self._pump(lambda: far.read(_CHUNK), back, ends))

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)

    async def _collect(self, near: asyncio.StreamReader, sent: asyncio.Queue[bytes]) -> None:
        """What the near side sends; an empty piece at the end."""
        with suppress(OSError):
            while data := await near.read(_CHUNK):
                self.held += len(data)
                if self.recorded is not None:
                    self.recorded += data
                sent.put_nowait(data)
        sent.put_nowait(b"")

    async def _held(self, sent: asyncio.Queue[bytes]) -> bytes:
        """The next piece of the near side, when it may go on."""
        data = await sent.get()
        await self._open.wait()
        self.held -= len(data)
        return data

    async def _pump(
        self, read: Callable[[], Awaitable[bytes]], sink: asyncio.StreamWriter, ends: set[asyncio.StreamWriter]
    ) -> None:
        """Until one side ends, in whatever way; the other then ends too."""
        with suppress(OSError):
            while data := await read():
                sink.write(data)
                await sink.drain()
        for end in ends & self._writers:
            end.transport.abort()
        self._writers -= ends
        if not self._writers:
            self.held = 0

    def _reset(self) -> None:
        self._cut = True
        for pump in self._pumps:
            pump.cancel()
        for end in self._writers:
            end.transport.abort()
        self._writers, self.held = set(), 0

    def _mend(self) -> None:
        self._cut = False

    def _do(self, what: Callable[[], T]) -> T:
        """Done when this returns."""

        async def run() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(_STOP_SECONDS)
