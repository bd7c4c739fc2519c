"""The life of the service, in this process: ready, watched, drained. Signals are real, devices are made when told."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gpu_worker.config import parse
from gpu_worker.service import NAME, serve
from gpu_worker.worker import Worker
from tests.gpu_worker.calling import MODEL, execute, frames, load, status
from tests.gpu_worker.conftest import one_thread_here
from tests.gpu_worker.test_traffic import GOOD, RESERVE, half
from tests.wire.test_metrics import read_page
from tests.wire.test_tls import files
from wire.errors import CleaveError, DeniedError, PreconditionError
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Service:
    """A service that runs in this event loop, and a channel to it."""

    def __init__(self, task: "asyncio.Task[None]", address: str, channel: grpc.aio.Channel) -> None:
        self.task, self.address = task, address
        self.stub: Any = gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)
        self.reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def check(self, name: str = "") -> int:
        answer: int = (await self.health.Check(health_pb2.HealthCheckRequest(service=name))).status
        return answer

    def watch(self, name: str = "") -> Any:
        return self.health.Watch(health_pb2.HealthCheckRequest(service=name))

    async def ready(self) -> None:
        async for answer in self.watch():
            if answer.status == SERVING:
                return

    def signal(self) -> None:
        assert not self.task.done()
        os.kill(os.getpid(), signal.SIGTERM)

    async def draining(self) -> None:
        async for answer in self.watch():
            if answer.status == NOT_SERVING:
                return


Start = Callable[..., AbstractAsyncContextManager[Service]]


@pytest.fixture
def device() -> threading.Event:
    """Set: a worker is made at once."""
    event = threading.Event()
    event.set()
    return event


@pytest.fixture
def start(
    model_folders: dict[str, Path],
    tmp_path: Path,
    device: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Start:
    """`async with start("--flag", ...) as service`: ended with a signal, unless the test did that."""

    def make_worker(_: Any, folders: dict[str, Path]) -> Worker:
        device.wait(30)
        one_thread_here()
        return Worker(folders, "cpu", ring_only=False)

    monkeypatch.setattr("gpu_worker.service._make_worker", make_worker)

    @asynccontextmanager
    async def run(*words: str, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[Service]:
        settings = parse([f"--listen=unix:{tmp_path}/gpu", f"--model={model_folders[MODEL]}", *words])
        task = asyncio.create_task(serve(settings))
        said = ""
        while not said.endswith("\n"):
            await asyncio.sleep(0.01)
            said += capsys.readouterr().out
            if task.done():
                task.result()
        address = said.strip().removeprefix("listening on ").replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        make = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
        async with make as channel:
            service = Service(task, address, channel)
            try:
                yield service
            finally:
                if not task.done():
                    service.signal()
                    await task

    return run


async def test_health_follows_the_device_and_is_answered_while_it_computes(
    start: Start, device: threading.Event
) -> None:
    device.clear()
    async with start() as service:
        assert [await service.check(name) for name in ("", NAME)] == [NOT_SERVING, NOT_SERVING]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.check("another")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = service.watch(NAME)
        assert (await watch.read()).status == NOT_SERVING
        device.set()
        assert (await watch.read()).status == SERVING
        assert await service.check() == SERVING
        service.signal()
        assert (await watch.read()).status == NOT_SERVING
        await service.task


async def test_an_idle_stream_does_not_hold_up_the_end(start: Start) -> None:
    async with start("--drain-seconds=1000") as service:
        await service.ready()
        await load(service.stub)
        stream = service.stub.Execute()
        await stream.write(frames(1, RESERVE)[0])
        assert (await stream.read()).id == 1
        service.signal()
        await service.task


async def test_a_call_under_way_may_end_and_nothing_begins(start: Start) -> None:
    async with start("--drain-seconds=1000") as service:
        await service.ready()
        await load(service.stub)
        stream = service.stub.Execute()
        await stream.write(GOOD)
        assert (await stream.read()).id == 1
        await stream.write(half(2))
        await asyncio.sleep(0.1)
        service.signal()
        await service.draining()
        assert (await status(service.stub, [GOOD]))[0] is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError, match="draining") as caught:
            await load(service.stub)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await stream.write(pb.ExecuteRequest(id=2, data=GOOD.data[8:]))
        answer = await stream.read()
        assert (answer.id, answer.refused) == (2, 0)
        await service.task


@pytest.mark.parametrize(("words", "signals"), [(["--drain-seconds=1000"], 2), (["--drain-seconds=0.1"], 1)])
async def test_the_end_comes_with_a_second_signal_or_when_the_time_is_over(
    start: Start, words: list[str], signals: int
) -> None:
    async with start(*words) as service:
        await service.ready()
        await load(service.stub)
        stream = service.stub.Execute()
        await stream.write(half(1))
        await asyncio.sleep(0.1)
        for _ in range(signals):
            service.signal()
            await asyncio.sleep(0.05)
        await service.task
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await stream.read()


async def test_a_signal_before_the_device_is_ready(start: Start, device: threading.Event) -> None:
    device.clear()
    async with start("--drain-seconds=1000") as service:
        service.signal()
        await service.task
        device.set()


def _listed(answer: Any) -> set[str]:
    return {service.name for service in answer.list_services_response.service}


async def test_reflection_is_asked_for(start: Start) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with start("--reflection") as service:
        answers = [answer async for answer in service.reflection.ServerReflectionInfo(iter([request]))]
        assert _listed(answers[0]) == {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    async with start() as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(service.reflection.ServerReflectionInfo(iter([request]))))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_without_its_package(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc_reflection.v1alpha", None)
    with pytest.raises(PreconditionError, match="grpcio-reflection"):
        async with start("--reflection"):
            pass


async def _page(port: int) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    return {name: value for (name, labels), value in read_page(body.decode())[1].items() if not labels}


async def test_metrics(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free_port = probe.getsockname()[1]
    async with start(f"--metrics=127.0.0.1:{free_port}") as service:
        await service.ready()
        before = await _page(free_port)
        await load(service.stub)
        await execute(service.stub, [GOOD])
        stream = service.stub.Execute()
        await stream.write(frames(1, RESERVE)[0])
        await stream.read()
        after = await _page(free_port)
    assert set(before) == {
        "cleave_gpu_calls_total", "cleave_gpu_calls_refused_total", "cleave_gpu_streams", "cleave_gpu_cache_bytes",
        "cleave_gpu_bytes_received_total", "cleave_gpu_bytes_sent_total", "cleave_gpu_compute_seconds_sum",
        "cleave_gpu_compute_seconds_count", "cleave_gpu_cache_limit_bytes", "process_resident_memory_bytes",
    }  # fmt: skip
    assert (before["cleave_gpu_calls_total"], after["cleave_gpu_calls_total"]) == (0, 3)
    assert (after["cleave_gpu_streams"], after["cleave_gpu_compute_seconds_count"]) == (1, 2)
    assert after["cleave_gpu_bytes_received_total"] == len(GOOD.data)
    assert 0 == before["cleave_gpu_cache_bytes"] < after["cleave_gpu_cache_bytes"] < 4 << 30
    assert after["cleave_gpu_cache_limit_bytes"] == 4 << 30


@pytest.mark.parametrize(
    ("words", "kind", "complaint"),
    [
        (["--metrics=0.0.0.0:9464"], DeniedError, "loopback"),
        (["--listen=0.0.0.0:0"], PreconditionError, "--insecure-plaintext"),
        (["--listen=127.0.0.1:{used}"], PreconditionError, "in use"),
        (["--metrics=127.0.0.1:{used}"], CleaveError, "in use"),
        (["--tls-certificate=c", "--tls-key=k", "--tls-authority=a"], PreconditionError, "c cannot be read"),
    ],
)
async def test_what_cannot_be_served_is_said_before_a_device_is_made(
    start: Start, monkeypatch: pytest.MonkeyPatch, words: list[str], kind: type[CleaveError], complaint: str
) -> None:
    monkeypatch.setattr("gpu_worker.service._make_worker", lambda *_: pytest.fail("a device was made"))
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    used = taken.sockets[0].getsockname()[1]
    with pytest.raises(kind, match=complaint):
        async with start(*[word.format(used=used) for word in words]):
            pass
    taken.close()


async def test_a_device_that_cannot_be_made_ends_the_service(
    start: Start, device: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Worker:
        device.wait(30)
        raise PreconditionError("no device")

    device.clear()
    monkeypatch.setattr("gpu_worker.service._make_worker", broken)
    async with start() as service:
        assert await service.check() == NOT_SERVING
        device.set()
        with pytest.raises(PreconditionError, match="no device"):
            await service.task


async def test_tls_is_for_addresses_beyond_this_machine(start: Start) -> None:
    tls = files("worker")
    words = [f"--tls-certificate={tls.certificate}", f"--tls-key={tls.key}", f"--tls-authority={tls.authority}"]
    async with start("--listen=0.0.0.0:0", *words, credentials=tls.client()) as service:
        assert (await service.stub.Describe(pb.DescribeRequest())).models == [MODEL]
        assert await service.check() in (SERVING, NOT_SERVING)
        for credentials in (files("intruder").client(), grpc.ssl_channel_credentials(tls.authority.read_bytes())):
            async with grpc.aio.secure_channel(service.address, credentials) as channel:
                stub: Any = gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Describe(pb.DescribeRequest(), timeout=20)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
