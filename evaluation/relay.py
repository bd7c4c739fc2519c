"""Connections that can be cut: bytes from one Unix socket to another and back, in a thread of their own."""

import asyncio
import contextlib
import threading
from typing import Self

_CHUNK = 1 << 16
_STOP_SECONDS = 5.0


class Relay:
    """Passes every connection to `target` on to `forward`. Addresses are spelled unix:PATH. Loop thread only."""

    def __init__(self, target: str, forward: str) -> None:
        self.target = target
        self._forward = forward.removeprefix("unix:")
        self._near: set[asyncio.WriteTransport] = set()
        self._refuses_until = 0.0

    async def listen(self) -> None:
        """From now on it passes connections on."""
        await asyncio.start_unix_server(self._pass_on, self.target.removeprefix("unix:"))

    def drop(self, silence: float) -> None:
        """End all connections for whoever made them. The other side hears nothing for `silence` seconds, then the end.

        So long nobody gets through.
        """
        self._refuses_until = asyncio.get_running_loop().time() + silence
        for near in self._near:
            near.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        far = None
        self._near.add(near.transport)
        try:
            if self._wait() <= 0:
                far_reader, far = await asyncio.open_unix_connection(self._forward)
                ways = [asyncio.create_task(_copy(reader, far)), asyncio.create_task(_copy(far_reader, near))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(self._wait())
        except OSError:
            pass  # nobody listens at the far end
        finally:
            self._near.discard(near.transport)
            near.transport.abort()
            if far is not None:
                far.transport.abort()

    def _wait(self) -> float:
        return max(0.0, self._refuses_until - asyncio.get_running_loop().time())


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Until one of them ends."""
    with contextlib.suppress(OSError):
        while (data := await source.read(_CHUNK)) and not sink.is_closing():
            sink.write(data)
            await sink.drain()


class Relays:
    """The thread that relays live in. A context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(_end_all(), self._loop).result(_STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        self._loop.close()

    def add(self, target: str, forward: str) -> Relay:
        """A relay that listens."""
        relay = Relay(target, forward)
        asyncio.run_coroutine_threadsafe(relay.listen(), self._loop).result(_STOP_SECONDS)
        return relay

    def drop(self, relay: Relay, silence: float) -> None:
        """See Relay.drop; from any thread."""
        self._loop.call_soon_threadsafe(relay.drop, silence)


async def _end_all() -> None:
    """Cancel whatever the loop still runs."""
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
