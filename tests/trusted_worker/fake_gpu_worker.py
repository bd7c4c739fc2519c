"""A GPU worker that misbehaves in every way, over gRPC and on a stream socket, with one and the same behaviour."""

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from trusted_worker.offload import GpuWorker
from wire import codec, stream_socket
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

Frames = list[pb.ExecuteResponse]
Behaviour = Callable[[int, codec.Array | None], Frames]

PRIVATE = "a text that the untrusted worker chose"


def answer(number: int, array: codec.Array) -> Frames:
    """An honest answer."""
    first, *rest = codec.split(array)
    head = pb.ExecuteResponse(id=number, header=codec.header_of(array), data=first)
    return [head, *[pb.ExecuteResponse(id=number, data=data) for data in rest]]


def doubled(number: int, array: codec.Array | None) -> Frames:
    """What the honest worker of these tests computes."""
    if array is None:
        return [pb.ExecuteResponse(id=number)]
    twice: Any = array * 2
    return answer(number, twice)


class Server(gpu_worker_pb2_grpc.GpuWorkerServiceServicer):
    """Answers come from `behaviour`; it hangs, aborts or leaves when it is told to."""

    def __init__(self, folder: Path, plane: str) -> None:
        self.target, self._socket = f"unix:{folder}/gpu", f"unix:{folder}/gpu.stream"
        self.stream = self._socket if plane == "stream" else None
        self.leave, self.leave_after = False, False
        self.behaviour: Behaviour = doubled
        self.loads: list[str] = []
        self.streams, self.refuse_load, self.hang, self.hang_after = 0, False, False, 0
        self.abort: grpc.StatusCode | None = None
        self.released = threading.Event()
        self.tickets: set[bytes] = set()
        self.refuse_ticket, self.ticket_bytes = False, stream_socket.TICKET_BYTES
        self.start()

    def client(self, **options: Any) -> GpuWorker:
        """A GpuWorker that knows this server."""
        return GpuWorker(self.target, "tiny", pb.PRECISION_INT8, stream=self.stream, **options)

    def start(self) -> None:
        """Listen, again after `stop`."""
        self.server = grpc.server(ThreadPoolExecutor(4))
        gpu_worker_pb2_grpc.add_GpuWorkerServiceServicer_to_server(self, self.server)
        self.server.add_insecure_port(self.target)
        self.listener = stream_socket.listen(self._socket)
        self.listener.setblocking(True)
        self.peers: list[socket.socket] = []
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()
        self.server.start()

    def stop(self) -> None:
        """Close every stream at once."""
        self.server.stop(None).wait()
        for one in (self.listener, *self.peers):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return pb.DescribeResponse()

    def Load(self, request: pb.LoadRequest, context: Any) -> pb.LoadResponse:
        self.loads.append(request.model)
        if self.refuse_load:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, PRIVATE)
        return pb.LoadResponse()

    def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachResponse:
        ticket = secrets.token_bytes(self.ticket_bytes)
        self.tickets.add(ticket)
        return pb.AttachResponse(ticket=ticket)

    def Execute(self, requests: Iterator[pb.ExecuteRequest], context: Any) -> Iterator[pb.ExecuteResponse]:
        self.streams += 1
        for first in requests:
            array = self._tensor(first, requests)
            if self.leave:
                return
            if self.abort is not None:
                context.abort(self.abort, PRIVATE)
            for count, frame in enumerate(self.behaviour(first.id, array)):
                if self.hang and count >= self.hang_after:
                    self.released.wait(20)
                yield frame
            if self.leave_after:
                return

    def _tensor(self, first: pb.ExecuteRequest, rest: Iterator[pb.ExecuteRequest]) -> codec.Array | None:
        if not first.HasField("header"):
            return None
        assembler = codec.Assembler(first.header)
        assembler.add(first.data)
        while not assembler.done:
            assembler.add(next(rest).data)
        return assembler.array()

    def _accept(self, listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                self.peers.append(peer)
                threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """The same Execute, over frames of the socket."""
        with peer, contextlib.suppress(OSError, EOFError):
            good = read(peer, stream_socket.TICKET_BYTES) in self.tickets and not self.refuse_ticket
            unauthenticated = grpc.StatusCode.UNAUTHENTICATED.value[0]
            _write(peer, pb.ExecuteResponse() if good else pb.ExecuteResponse(ended=unauthenticated))
            try:
                for frame in self.Execute(_requests(peer), _Context()) if good else ():
                    _write(peer, frame)
            except _Aborted as aborted:
                _write(peer, pb.ExecuteResponse(ended=aborted.code.value[0]))


class _Aborted(Exception):  # noqa: N818  (a status)
    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__()
        self.code = code


class _Context:
    def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise _Aborted(code)


def _requests(peer: socket.socket) -> Iterator[pb.ExecuteRequest]:
    with contextlib.suppress(EOFError):
        while True:
            length, size = stream_socket.lengths(memoryview(read(peer, stream_socket.PREFIX_BYTES)))
            frame = pb.ExecuteRequest.FromString(read(peer, length))
            frame.data = read(peer, size)
            yield frame


def read(peer: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises EOFError when the peer leaves before."""
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _write(peer: socket.socket, frame: pb.ExecuteResponse) -> None:
    """Lengths are what they are: a frame over the limit is written too."""
    bare = pb.ExecuteResponse()
    bare.CopyFrom(frame)
    bare.ClearField("data")
    peer.sendall(stream_socket.pack(bare, len(frame.data)) + frame.data)


def ask(worker: GpuWorker, operation: pb.Operation, array: Any, shape: tuple[int, ...]) -> Any:
    """The answer, in memory of ours."""
    into: Any = np.full(shape, -1, np.float32 if operation.HasField("forward") else np.int32)
    worker.call(operation, array, into)
    return into
