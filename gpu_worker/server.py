"""The gRPC face of the worker: thin methods over the compute thread, and errors turned into status codes.

One asyncio thread talks, one compute thread calculates. Brief calls, which would take longer to hand over than to carry
out, the asyncio thread carries out itself while the compute thread is idle. A stream reads its next frame only after
the last call's answer is handed to gRPC, so what a stream holds is one call and one answer beyond gRPC's own windows,
and until their deadlines only: a peer that stops within a call, or takes no answers, loses what it reserved.
"""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from gpu_worker.calls import Call, CallReader
from gpu_worker.compute import Compute, Outcome, carry_out
from gpu_worker.deadline import Deadline
from gpu_worker.stream_plane import StreamPlane
from gpu_worker.traffic import MAX_STREAMS, Traffic
from wire.channel import server_options
from wire.codec import MAX_ROWS, header_of, split
from wire.errors import CleaveError, PreconditionError
from wire.messages import Parser
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

if TYPE_CHECKING:
    from gpu_worker.stream import Stream
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

REQUEST_SECONDS = 60.0
MAX_RPCS = 2 * MAX_STREAMS  # there is room for health checks when no stream is left


class Servicer(gpu_worker_pb2_grpc.GpuWorkerServiceServicer):
    """GpuWorkerService over a Compute."""

    def __init__(
        self,
        compute: Compute,
        models: list[str],
        ring_only: bool,
        traffic: Traffic | None = None,
        request_seconds: float = REQUEST_SECONDS,
        plane: StreamPlane | None = None,
    ) -> None:
        self._compute, self._plane = compute, plane
        self._models = models
        self._ring_only = ring_only
        self._traffic = traffic or Traffic()
        self._request_seconds = request_seconds

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
            with self._traffic.stream(), self._traffic.grpc:
                worker = await self._compute.worker()
                await self._compute.run(worker.load, request.model, request.precision)
        except Exception as error:
            await _abort(context, error)
        return pb.LoadResponse()

    async def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachResponse:
        """A ticket for the stream socket."""
        try:
            if self._plane is None:
                raise PreconditionError("this worker has no stream socket: start it with --stream ADDR")
            ticket = self._plane.issue()
        except Exception as error:
            await _abort(context, error)
        return pb.AttachResponse(ticket=ticket)

    async def Execute(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> None:
        """Answer calls in order until the peer ends the stream; then drop what it reserved and provisioned.

        A peer that takes no answers does not take the status either: its stream is counted until its connection ends.
        """
        try:
            with self._traffic.stream():
                try:
                    await self._converse(aiter(request_iterator), context)
                except Exception as error:
                    self._traffic.grpc.refused += 1
                    await _abort(context, error)
        except CleaveError as error:
            self._traffic.grpc.refused += 1
            await _abort(context, error)
        except asyncio.CancelledError:
            return  # the peer left, or the server stops: there is nobody to tell

    async def _converse(self, frames: AsyncIterator[pb.ExecuteRequest], context: Any) -> None:
        worker = await self._compute.worker()
        stream = worker.open_stream()
        deadline = Deadline(self._request_seconds, "the peer stopped within a call")
        try:
            await self._answer_calls(worker, stream, frames, deadline, context)
        finally:
            deadline.close()
            self._compute.submit(stream.close)

    async def _answer_calls(
        self,
        worker: "Worker",
        stream: "Stream",
        frames: AsyncIterator[pb.ExecuteRequest],
        deadline: Deadline,
        context: Any,
    ) -> None:
        """Between calls a stream may be idle for as long as it likes."""
        reader = CallReader(self._ring_only)
        async for first in frames:
            with self._traffic.grpc:
                call = self._add(reader, first, worker)
                if call is None:
                    with deadline:
                        call = await self._read_on(reader, frames, worker)
                if call is None:
                    break
                outcome = await self._carry_out(worker, call, stream)
                with deadline:
                    await self._answer(call.id, outcome, context)
        reader.finish()

    def _add(self, reader: CallReader, frame: pb.ExecuteRequest, worker: "Worker") -> Call | None:
        """The call, if this frame completes it."""
        self._traffic.grpc.received += len(frame.data)
        return reader.add(frame, worker.model)

    async def _read_on(
        self, reader: CallReader, frames: AsyncIterator[pb.ExecuteRequest], worker: "Worker"
    ) -> Call | None:
        """The call that has begun; None when the frames end before it does."""
        async for frame in frames:
            if call := self._add(reader, frame, worker):
                return call
        return None

    async def _carry_out(self, worker: "Worker", call: Call, stream: "Stream") -> Outcome:
        work = worker, call, stream, self._traffic.compute
        if worker.is_brief(call) and (outcome := self._compute.at_once(carry_out, *work)) is not None:
            return outcome
        return await self._compute.run(carry_out, *work)

    async def _answer(self, number: int, outcome: Outcome, context: Any) -> None:
        """Send what became of a call, frame by frame; only the first frame carries more than data."""
        first = pb.ExecuteResponse(id=number, compute_us=outcome.microseconds)
        if outcome.refused is not None:
            self._traffic.grpc.refused += 1
            first.refused = outcome.refused.code.value[0]
            log.warning("a call was refused: %s", type(outcome.refused).__name__)
        if outcome.result is None:
            await context.write(first)
            return
        first.header.CopyFrom(header_of(outcome.result))
        for position, data in enumerate(split(outcome.result)):
            response = pb.ExecuteResponse(id=number) if position else first
            response.data = data
            await context.write(response)
            self._traffic.grpc.sent += len(data)


def make_server(servicer: Servicer) -> grpc.aio.Server:
    """A server for the servicer, which does not listen yet."""
    server = grpc.aio.server(options=server_options(), maximum_concurrent_rpcs=MAX_RPCS, interceptors=[Parser()])
    gpu_worker_pb2_grpc.add_GpuWorkerServiceServicer_to_server(servicer, server)
    return server


async def _abort(context: Any, error: Exception) -> NoReturn:
    """End the call with the error's status. What is not ours is logged without its message, which may hold values."""
    if isinstance(error, CleaveError):
        await context.abort(error.code, str(error))
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("internal error: %s at %s", type(error).__name__, where)
    await context.abort(grpc.StatusCode.INTERNAL, "the worker failed; its log says where")
    raise error
