"""The life of the process: listen, load, serve, drain, end. Health and metrics are answered by the asyncio thread."""

import asyncio
import contextlib
import logging
import signal

import grpc

from trusted_worker.config import Settings
from trusted_worker.process_limit import ProcessLimit
from trusted_worker.server import TrustedWorker
from trusted_worker.service import Service
from wire import channel, metrics
from wire.errors import DeniedError, UnavailableError
from wire.health import Health
from wire.messages import Parser
from wire.v1 import trusted_worker_pb2, trusted_worker_pb2_grpc

log = logging.getLogger(__name__)
NAME = trusted_worker_pb2.DESCRIPTOR.services_by_name["TrustedWorkerService"].full_name
WATCH_SECONDS = 0.25
GRACE_SECONDS = 1.0  # for calls that are under way when everything ends
MAX_CALLS = 256  # at once, of all clients


def run(settings: Settings, limit: ProcessLimit) -> None:
    """Serve until SIGTERM or SIGINT. Raises CleaveError when the model or an address cannot be used."""
    encrypted = settings.tls_certificate is not None
    for address, safe in ((settings.listen, False), (settings.gpu_worker, encrypted)):
        if address and not channel.is_local(address) and not safe and not settings.insecure_plaintext:
            raise DeniedError(
                f"{address} is not on this machine and nothing is encrypted: use loopback, a Unix socket, or "
                "(to the GPU worker) --tls-certificate, or say --insecure-plaintext"
            )
    log.info("process memory: %s, %d bytes", limit.kind, limit.bytes)
    if settings.switch_us:
        log.warning("%d us are charged for each exchange, as a world switch", settings.switch_us)
    if settings.insecure_unchecked_tiles:
        log.warning("streamed weights are used without comparing their digests")
    service = Service(settings, limit)
    asyncio.run(_serve(service, TrustedWorker(service, settings), settings))


async def _serve(service: Service, servicer: TrustedWorker, settings: Settings) -> None:
    server = grpc.aio.server(
        options=channel.server_options(), maximum_concurrent_rpcs=MAX_CALLS, interceptors=[Parser()]
    )
    trusted_worker_pb2_grpc.add_TrustedWorkerServiceServicer_to_server(servicer, server)
    healthy = Health(NAME)
    await healthy.add(server)
    if settings.reflection:
        healthy.reflect(server)
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError:
        raise UnavailableError(f"cannot listen on {settings.listen}: is the address in use?") from None
    page = await metrics.serve(settings.metrics, service.metrics) if settings.metrics else None
    await server.start()
    unix = settings.listen.startswith("unix:")
    print("listening on", settings.listen if unix else f"{settings.listen.rpartition(':')[0]}:{port}", flush=True)
    service.engine.start()
    try:
        await _until_stopped(service, settings, healthy)
    finally:
        service.engine.stop()
        if page is not None:
            page.close()
        await server.stop(GRACE_SECONDS)


async def _until_stopped(service: Service, settings: Settings, healthy: Health) -> None:
    """Watch deadlines until a signal comes, then drain. Raises what loading the model raised."""
    stopping, changed = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        stopping.set()
        changed.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    loading = asyncio.wrap_future(service.engine.loaded)
    loading.add_done_callback(lambda _: changed.set())
    served = False
    while not stopping.is_set():
        service.worker.expire()
        if loading.done() and not served:
            loading.result()
            served = True
            await healthy.report(serving=True)
            print("serving", flush=True)
        changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), WATCH_SECONDS)
    await healthy.report(serving=False)
    stopping.clear()  # another signal ends the draining
    await _drain(service, settings.drain_seconds, stopping)


async def _drain(service: Service, seconds: float, stopping: asyncio.Event) -> None:
    """No new sessions; answers that are under way may end."""
    service.draining = True
    log.info("draining: %d answers are under way", service.engine.running)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while service.engine.running and not stopping.is_set():
                service.worker.expire()
                await asyncio.sleep(WATCH_SECONDS / 10)
