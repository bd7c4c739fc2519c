"""The gRPC face of the worker: thin methods over the compute thread, and errors turned into status codes.

One asyncio thread talks, one compute thread calculates. A stream reads its next frame only after the last call's
answer is handed to gRPC, so what a stream holds is one call and one answer beyond gRPC's own windows.
"""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import grpc
import grpc.aio

from gpu_worker.calls import Call, CallReader
from wire.channel import server_options
from wire.codec import MAX_ROWS, header_of, split
from wire.errors import CleaveError
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

if TYPE_CHECKING:
    from gpu_worker.stream import Stream
    from gpu_worker.worker import Result, Worker

log = logging.getLogger(__name__)

MAX_STREAMS = 64  # calls in flight, of all peers together

P = ParamSpec("P")
T = TypeVar("T")


class Compute:
    """The one thread that calculates. The worker is made in it, so that heavy imports do not delay listening."""

    def __init__(self, make_worker: "Callable[[], Worker]") -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._worker = self._thread.submit(make_worker)

    async def worker(self) -> "Worker":
        """The worker, once it exists. Raises what making it raised."""
        return await asyncio.shield(asyncio.wrap_future(self._worker))

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, from the compute thread."""
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Queue the function without waiting for it."""
        return self._thread.submit(function, *args, **kwargs)

    def stop(self) -> None:
        """Take no more work. What runs already is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Servicer(gpu_worker_pb2_grpc.GpuWorkerServiceServicer):
    """GpuWorkerService over a Compute."""

    def __init__(self, compute: Compute, models: list[str], ring_only: bool) -> None:
        self._compute = compute
        self._models = models
        self._ring_only = ring_only

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """What this worker is."""
        try:
            device = (await self._compute.worker()).device
        except Exception as error:
            await _abort(context, error)
        return pb.DescribeResponse(device=device, models=self._models, ring_only=self._ring_only, max_rows=MAX_ROWS)

    async def Load(self, request: pb.LoadRequest, context: Any) -> pb.LoadResponse:
        """Make a model ready."""
        try:
            worker = await self._compute.worker()
            await self._compute.run(worker.load, request.model, request.precision)
        except Exception as error:
            await _abort(context, error)
        return pb.LoadResponse()

    async def Execute(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> None:
        """Answer calls in order until the peer ends the stream; then drop what it reserved and provisioned."""
        try:
            worker = await self._compute.worker()
            reader, stream = CallReader(self._ring_only), worker.open_stream()
            try:
                async for frame in request_iterator:
                    call = reader.add(frame, worker.model)
                    if call is not None:
                        await self._carry_out(worker, call, stream, context)
                reader.finish()
            finally:
                self._compute.submit(stream.close)
        except asyncio.CancelledError:
            return  # the peer left, or the server stops: there is nobody to tell
        except Exception as error:
            await _abort(context, error)

    async def _carry_out(self, worker: "Worker", call: Call, stream: "Stream", context: Any) -> None:
        """Answer one call, or refuse it: what a well-formed call cannot have ends that call, not its stream."""
        try:
            result = await self._compute.run(worker.execute, call, stream)
        except CleaveError as error:
            log.warning("a call was refused: %s", type(error).__name__)
            await context.write(pb.ExecuteResponse(id=call.id, refused=error.code.value[0]))
        else:
            await _answer(context, call, result)


def make_server(servicer: Servicer) -> grpc.aio.Server:
    """A server for the servicer, which does not listen yet."""
    server = grpc.aio.server(options=server_options(), maximum_concurrent_rpcs=MAX_STREAMS)
    gpu_worker_pb2_grpc.add_GpuWorkerServiceServicer_to_server(servicer, server)
    return server


async def _answer(context: Any, call: Call, result: "Result") -> None:
    """Send a result frame by frame; only the first frame carries the header."""
    if result is None:
        await context.write(pb.ExecuteResponse(id=call.id))
        return
    for number, data in enumerate(split(result)):
        header = header_of(result) if number == 0 else None
        await context.write(pb.ExecuteResponse(id=call.id, header=header, data=data))


async def _abort(context: Any, error: Exception) -> NoReturn:
    """End the call with the error's status. What is not ours is logged without its message, which may hold values."""
    if isinstance(error, CleaveError):
        await context.abort(error.code, str(error))
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s at\n%s", type(error).__name__, where)
    await context.abort(grpc.StatusCode.INTERNAL, "the worker failed; its log says where")
    raise error
