"""The only code that talks to the GPU worker: one stream of calls, used from the compute thread.

What comes back is hostile until a scheme has verified it. Here it is only bounded: the right id, dtype, shape and
length, copied once, into the caller's array; anything else is a VerificationError. Every wait has a deadline:
`expire`, called from the asyncio thread, cancels a call that is over it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

import grpc

from trusted_worker.grpc_plane import GrpcPlane, unavailable
from trusted_worker.stream_plane import StreamPlane
from wire import channel, codec
from wire.errors import (
    CleaveError,
    ContextError,
    DeadlineError,
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
    VerificationError,
)
from wire.metrics import TRANSPORTS, Histogram
from wire.tls import Tls
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

LOAD_SECONDS = 600.0
LONGEST_SPIN = 0.002


@dataclass
class Traffic:
    """What crossed to and from the GPU worker. Bytes are serialised messages."""

    exchanges: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0  # in calls, world switches included
    worker_seconds: float = 0.0  # of these, what the GPU worker says that it computed
    transport: Histogram = field(default_factory=partial(Histogram, TRANSPORTS))  # what neither of the two computed in


class Plane(Protocol):
    """What carries the frames of one stream. Raises UnavailableError when it has ended."""

    @property
    def ended(self) -> bool:
        """Whether it ended while nothing was asked of it."""

    def send(self, frame: pb.ExecuteRequest, data: memoryview) -> int:
        """One frame with its data. How many bytes that were."""

    def receive(self) -> tuple[pb.ExecuteResponse, int, int]:
        """The next frame, how many bytes of data it has, and how many it has altogether."""

    def take(self, place: memoryview) -> None:
        """The data of that frame, copied to where they belong."""

    def cancel(self) -> None:
        """Have it end, and whoever waits for it wake up. From any thread."""

    def close(self) -> None:
        """Give it back."""


class GpuWorker:
    """A connection that is made when it is needed, and made again when it broke.

    `stream`: the address of the worker's stream socket, for calls to go there instead of over gRPC.
    `switch_us`: microseconds that each exchange takes longer, as leaving a TEE and coming back would.
    """

    def __init__(
        self,
        target: str,
        model: str,
        precision: pb.Precision.ValueType,
        seconds: float = 60.0,
        connect_seconds: float = 10.0,
        tls: Tls | None = None,
        switch_us: int = 0,
        stream: str | None = None,
    ) -> None:
        self._stream_address = stream
        self._switch_seconds = switch_us / 1e6
        self._connect_seconds, self._tls = connect_seconds, tls
        self.traffic = Traffic()
        self._stream = 0
        self.greet: Callable[[], None] | None = None  # runs on every new stream before anything else
        self._target, self._model, self._precision, self._seconds = target, model, precision, seconds
        self._channel: grpc.Channel | None = None
        self._plane: Plane | None = None
        self._started: float | None = None
        self._claimed = 0.0  # seconds that the worker says it computed
        self._beside = 0.0  # seconds of what was done here meanwhile
        self._id = 0

    @property
    def stream(self) -> int:
        """Counts streams: what the worker held for an earlier one is gone."""
        self._notice_end()
        return self._stream

    def connect(self, patient: bool = False) -> None:
        """Open the stream and have the model loaded. Raises UnavailableError.

        `patient`: a worker that does not listen yet may begin to within the deadline; else that is an error at once.
        """
        self.close()
        options, target = channel.client_options(), self._target
        self._channel = (
            grpc.secure_channel(target, self._tls.client(), options)
            if self._tls
            else grpc.insecure_channel(target, options)
        )
        stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(self._channel)
        try:
            stub.Describe(pb.DescribeRequest(), timeout=self._connect_seconds, wait_for_ready=patient)
            stub.Load(pb.LoadRequest(model=self._model, precision=self._precision), timeout=LOAD_SECONDS)
            self._plane = self._open_plane(stub)
        except grpc.RpcError as error:
            self.close()
            raise unavailable(error) from None
        except CleaveError:
            self.close()
            raise
        if self.greet is not None:
            self.greet()

    def close(self) -> None:
        """End the stream; the worker drops what it reserved for it."""
        if self._plane is not None:
            self._plane.close()
        if self._channel is not None:
            self._stream += 1
            self._channel.close()
        self._channel, self._plane = None, None

    def expire(self) -> None:
        """Cancel the call in flight if it is over its deadline. Safe to call from another thread."""
        started, plane = self._started, self._plane
        if started is not None and plane is not None and time.monotonic() - started > self._seconds:
            plane.cancel()

    def call(
        self,
        operation: pb.Operation,
        array: codec.Array | None,
        into: codec.Array | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """One exchange. The answer fills `into`, C-contiguous; None for an operation that answers without a tensor.

        `meanwhile` runs once, when everything is sent and before an answer is read; its errors end the stream.
        Raises VerificationError for an answer of another dtype, shape or length, UnavailableError or DeadlineError when
        none comes. `into` holds junk then.
        """
        self._notice_end()
        if self._plane is None:
            self.connect()
        self._started = time.monotonic()
        try:
            self._switch()
            self._exchange(cast(Plane, self._plane), operation, array, into, meanwhile)
        except _Refused as refused:  # this call only
            raise _refusal(refused.number) from None
        except UnavailableError:
            late = time.monotonic() - self._started > self._seconds
            self.close()
            if late:
                raise DeadlineError("the GPU worker did not answer in time") from None
            raise
        except CleaveError:
            self.close()
            raise
        finally:
            elapsed = time.monotonic() - self._started
            self.traffic.seconds += elapsed
            self.traffic.worker_seconds += min(self._claimed, elapsed)
            computing = max(self._claimed, self._beside)
            self._started, self._claimed, self._beside = None, 0.0, 0.0
        self.traffic.exchanges += 1
        self.traffic.transport.observe(max(elapsed - computing, 0.0))

    def _open_plane(self, stub: gpu_worker_pb2_grpc.GpuWorkerServiceStub) -> Plane:
        if self._stream_address is None:
            return GrpcPlane(stub)
        ticket = stub.Attach(pb.AttachRequest(), timeout=self._connect_seconds).ticket
        return StreamPlane(self._stream_address, ticket, self._connect_seconds)

    def _notice_end(self) -> None:
        """A stream that ended between two calls is no error: nothing was on it."""
        if self._plane is not None and self._plane.ended:
            self.close()

    def _switch(self) -> None:
        """Take as long as a world switch. A sleep lasts 50 us and more longer than it should, which is what a switch
        takes: so the last 2 ms are spun."""
        if self._switch_seconds:
            end = time.perf_counter() + self._switch_seconds
            if self._switch_seconds > LONGEST_SPIN:
                time.sleep(self._switch_seconds - LONGEST_SPIN)
            while time.perf_counter() < end:
                pass

    def _exchange(
        self,
        plane: Plane,
        operation: pb.Operation,
        array: codec.Array | None,
        into: codec.Array | None,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        self._id += 1
        header = codec.header_of(array) if array is not None else None
        frame = pb.ExecuteRequest(id=self._id, operation=operation, header=header)
        for data in codec.pieces(array) if array is not None else [memoryview(b"")]:
            self.traffic.bytes_up += plane.send(frame, data)
            frame = pb.ExecuteRequest(id=self._id)
        if meanwhile is not None:
            begun = time.monotonic()
            meanwhile()
            self._beside = time.monotonic() - begun
        first, size = self._receive(plane)
        self._claimed = first.compute_us / 1e6
        if first.refused:
            raise _Refused(first.refused)
        if into is not None:
            self._assemble(plane, first, size, into)
        elif size:
            raise VerificationError

    def _assemble(self, plane: Plane, first: pb.ExecuteResponse, size: int, into: codec.Array) -> None:
        try:
            assembler = codec.Assembler(first.header, into)
            plane.take(assembler.place(size))
            while not assembler.done:
                _, size = self._receive(plane)
                plane.take(assembler.place(size))
        except InvalidArgumentError:
            raise VerificationError from None

    def _receive(self, plane: Plane) -> tuple[pb.ExecuteResponse, int]:
        """The next frame of this call, and how many bytes of data it has."""
        frame, size, total = plane.receive()
        self.traffic.bytes_down += total
        if frame.id != self._id or (frame.refused and size):
            raise VerificationError
        return frame, size


class _Refused(Exception):  # noqa: N818  (not an error of the stream)
    """The worker answered a call with a status code."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _refusal(number: int) -> CleaveError:
    """The code in our own words."""
    if number == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
        return ExhaustedError("the GPU worker has no memory left for a context of this size")
    if number == grpc.StatusCode.OUT_OF_RANGE.value[0]:
        return ContextError("the GPU worker's context is full")
    return UnavailableError(f"the GPU worker refused a call (status {number})")
