"""The life of the process: listen, make the device ready, serve, drain, end."""

import asyncio
import logging
import signal
from collections.abc import Awaitable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from gpu_worker.compute import Compute
from gpu_worker.config import Settings
from gpu_worker.server import Servicer, make_server
from gpu_worker.stream_plane import StreamPlane
from gpu_worker.traffic import Traffic
from wire import metrics
from wire.errors import PreconditionError
from wire.health import Health
from wire.v1 import gpu_worker_pb2 as pb

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

NAME = pb.DESCRIPTOR.services_by_name["GpuWorkerService"].full_name
GRACE_SECONDS = 0.5  # for streams that are still open when everything ends


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises CleaveError for what cannot be served, or not here."""
    folders, traffic, last = settings.folders(), Traffic(), asyncio.Event()
    stop = _on_signals(last)
    compute = Compute(partial(_make_worker, settings, folders))
    plane = _plane(settings, compute, traffic)
    server = make_server(Servicer(compute, list(folders), settings.ring_only, traffic, settings.request_seconds, plane))
    healthy = Health(NAME)
    await healthy.add(server)
    if settings.reflection:
        healthy.reflect(server)
    address = _bind(server, settings)  # before there is a compute thread, which would have to be waited for
    page = await metrics.serve(settings.metrics, partial(_page, traffic, compute)) if settings.metrics else None
    if settings.device == "cuda":
        await compute.worker()
    await server.start()
    print(f"listening on {address}", flush=True)
    try:
        await _until_stopped(compute, healthy, stop)
        traffic.draining = True
        await healthy.report(serving=False)
        log.info("draining: %d streams are open", traffic.streams)
        await _first_of(traffic.quiet(), last.wait(), seconds=settings.drain_seconds)
    finally:
        await server.stop(None if last.is_set() else GRACE_SECONDS)
        if plane is not None:
            await plane.stop()
        if page is not None:
            page.close()
        compute.stop()


def _on_signals(last: asyncio.Event) -> asyncio.Event:
    """Set by the first signal; `last` by the second."""
    stop = asyncio.Event()

    def count() -> None:
        (last if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, count)
    return stop


def _plane(settings: Settings, compute: Compute, traffic: Traffic) -> StreamPlane | None:
    """Raises PreconditionError for a socket that cannot be."""
    if settings.stream is None:
        return None
    return StreamPlane(settings.stream, compute, settings.ring_only, traffic, settings.request_seconds)


def _bind(server: grpc.aio.Server, settings: Settings) -> str:
    """The address with the port that it became. Raises PreconditionError, DeniedError."""
    listen, files = settings.listen, settings.tls()
    try:
        port = server.add_secure_port(listen, files.server()) if files else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise PreconditionError(f"cannot listen on {listen}: is the address in use?") from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


async def _until_stopped(compute: Compute, healthy: Health, stop: asyncio.Event) -> None:
    """Serving from when the worker exists. Raises what making it raised."""
    ready = asyncio.create_task(compute.worker())
    await _first_of(ready, stop.wait())
    if ready.done():
        log.info("ready on %s", ready.result().device)
        await healthy.report(serving=True)
        await stop.wait()


async def _first_of(*waits: Awaitable[Any], seconds: float | None = None) -> None:
    """Until one of these is over, or the time is."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _make_worker(settings: Settings, folders: dict[str, Path]) -> "Worker":
    """Runs in the compute thread: torch and numba keep their number of threads per calling thread."""
    try:
        import numba
        import torch
    except ImportError as error:
        raise PreconditionError(f"the package {error.name} is missing") from None

    from gpu_worker.recording import Recording
    from gpu_worker.worker import Worker

    _take_loggers_in()
    torch.set_num_threads(settings.threads)
    numba.set_num_threads(min(settings.threads, numba.get_num_threads()))
    recording = Recording(settings.record, settings.record_keep) if settings.record else None
    return Worker(folders, settings.device, settings.ring_only, recording)


def _take_loggers_in() -> None:
    """torch writes to stderr by itself; what it says belongs to the log, and to its list."""
    for logger in list(logging.Logger.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def _page(traffic: Traffic, compute: Compute) -> str:
    """What Prometheus reads."""
    worker = compute.made
    used, limit = worker.cache_bytes if worker else (0, 0)
    return metrics.render(
        [
            *traffic.metrics(),
            ("cleave_gpu_cache_bytes", "Reserved for KV caches.", used),
            ("cleave_gpu_cache_limit_bytes", "The most that all KV caches may take.", limit),
            ("process_resident_memory_bytes", "Resident memory of the process.", metrics.resident_bytes()),
        ]
    )
