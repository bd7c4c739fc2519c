"""A trusted worker without a model: it speaks the real protocol and answers from a script.

It is eager: whatever it was granted it sends before it looks at the next frame. So a client that ends a turn early
always has tokens to drain. It records every frame, and the most tokens that were ever outstanding.

With a table it leaves embedding to its clients, and takes each token's row exactly once, in order, as it should be.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from wire.channel import server_options
from wire.errors import CleaveError
from wire.sealing import Receiver, WorkerCall
from wire.v1 import gpu_worker_pb2, trusted_worker_pb2_grpc
from wire.v1 import trusted_worker_pb2 as pb

SESSION = b"0123456789abcdef"
ADAPTER = b"an adapter's name"[:16]
EOS = 2


@dataclass
class Script:
    """What the worker does. `answers` holds one list of tokens per turn."""

    answers: list[list[int]] = field(default_factory=list)
    provider: str = "none"
    scheme: str | None = None  # None: echo what was asked
    vocabulary: int = 300
    max_frame_tokens: int = 4096
    max_context: int = 1 << 20
    miscount: int = 0  # added to context_tokens
    overspend: bool = False  # one token more than granted
    refuse_open: tuple[grpc.StatusCode, str] | None = None
    refuse_once: tuple[grpc.StatusCode, str] | None = None
    adapter: bytes | None = None  # None: echo what was asked
    perturbation: float | None = None
    deaf: bool = False  # does not end a turn when it is told to
    fail_after: int | None = None  # tokens until DATA_LOSS
    cut_after: int | None = None  # tokens until the stream ends as if all were well
    table: npt.NDArray[np.float32] | None = None  # float32[vocabulary, hidden]: the client embeds
    stats: dict[str, Any] = field(default_factory=dict)  # further fields of StatsResponse


class FakeWorker(trusted_worker_pb2_grpc.TrustedWorkerServiceServicer):
    """The servicer, and the server around it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.nonces: list[bytes] = []
        self.opened: list[pb.OpenRequest] = []
        self.frames: list[pb.DecodeRequest] = []
        self.closed = threading.Event()
        self.most_outstanding = 0
        self.tokens = 0
        self.error: Any = None  # what the client said of it; set by tests
        self.receiver = Receiver()
        self.uploads = 0
        self.sealed: list[pb.Sealed] = []  # every frame of every client, as it came
        self._secret = b""
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=server_options())
        trusted_worker_pb2_grpc.add_TrustedWorkerServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.target = f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait(5)

    def Attest(self, request: pb.AttestRequest, context: grpc.ServicerContext) -> pb.AttestResponse:
        self.nonces.append(request.nonce)
        return pb.AttestResponse(
            provider=self.script.provider, nonce=request.nonce, hpke_key=self.receiver.public_key, claims=b"{}"
        )

    def Open(self, request: pb.Sealed, context: grpc.ServicerContext) -> pb.Sealed:
        if refusal := self.script.refuse_once or self.script.refuse_open:
            self.script.refuse_once = None
            context.abort(*refusal)
        call, asked = self._accept(request, "Open", pb.OpenRequest, context)
        self._secret = call.secret
        self.opened.append(asked)
        reply = pb.OpenResponse(
            session=SESSION,
            model=asked.model,
            scheme=self.script.scheme or asked.scheme,
            precision=asked.precision,
            max_context=self.script.max_context,
            vocabulary=self.script.vocabulary,
            max_frame_tokens=self.script.max_frame_tokens,
            client_embeds=self.script.table is not None,
            hidden=0 if self.script.table is None else self.script.table.shape[1],
            adapter=asked.adapter if self.script.adapter is None else self.script.adapter,
            perturbation=asked.sampling.perturbation if self.script.perturbation is None else self.script.perturbation,
        )
        return call.wrap(reply)

    def Close(self, request: pb.Sealed, context: grpc.ServicerContext) -> pb.Sealed:
        call, _ = self._accept(request, "Close", pb.CloseRequest, context)
        self.closed.set()
        return call.wrap(pb.CloseResponse())

    def Upload(self, request_iterator: Iterator[pb.Sealed], context: grpc.ServicerContext) -> pb.Sealed:
        call, piece = self._accept(next(request_iterator), "Upload", pb.UploadRequest, context)
        self.uploads += 1
        self.config, size, self.weights = piece.config, piece.weights_size, piece.weights
        while len(self.weights) < size:
            self.sealed.append(next(request_iterator))
            self.weights += call.open(self.sealed[-1], pb.UploadRequest).weights
        return call.wrap(pb.UploadResponse(adapter=ADAPTER, size=size))

    def _accept(
        self, sealed: pb.Sealed, method: str, kind: Any, context: grpc.ServicerContext
    ) -> tuple[WorkerCall, Any]:
        self.sealed.append(sealed)
        try:
            return self.receiver.accept(
                sealed, method, kind, None if method in ("Open", "Upload") else lambda _: self._secret
            )
        except CleaveError as error:
            context.abort(error.code, str(error))
            raise

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsResponse:
        return pb.StatsResponse(
            scheme="secure-infer",
            precision=gpu_worker_pb2.PRECISION_INT8,
            exchanges=5 * self.tokens,
            wire_bytes_up=100 * self.tokens,
            wire_bytes_down=200 * self.tokens,
            pads_issued=self.tokens,
            pads_in_stock=40,
            pads_capacity=80,
            memory_budget=64 << 20,
            memory_used=1 << 20,
            memory_peak=2 << 20,
            **self.script.stats,
        )

    def Decode(self, request_iterator: Iterator[pb.Sealed], context: grpc.ServicerContext) -> Iterator[pb.Sealed]:
        frames: Queue[pb.DecodeRequest | None] = Queue()
        first = next(request_iterator, None)
        if first is None:
            return
        call, frame = self._accept(first, "Decode", pb.DecodeRequest, context)
        self.frames.append(frame)
        frames.put(frame)
        threading.Thread(target=self._receive, args=(request_iterator, call, frames), daemon=True).start()
        for response in _Decoding(self, frames, context).run():
            yield call.wrap(response)

    def _receive(
        self, requests: Iterator[pb.Sealed], call: WorkerCall, frames: "Queue[pb.DecodeRequest | None]"
    ) -> None:
        try:
            for sealed in requests:
                self.sealed.append(sealed)
                frame = call.open(sealed, pb.DecodeRequest)
                self.frames.append(frame)
                frames.put(frame)
        except (grpc.RpcError, CleaveError):
            pass
        frames.put(None)


class _Decoding:
    """One Decode call."""

    def __init__(
        self, worker: FakeWorker, frames: "Queue[pb.DecodeRequest | None]", context: grpc.ServicerContext
    ) -> None:
        self._worker, self._script = worker, worker.script
        self._frames, self._grpc = frames, context
        self._answer: Iterator[int] | None = None
        self._credit = 0
        self._context: list[int] = []
        self._embedded = 0  # tokens of the context whose rows are here
        self._cut = False

    def run(self) -> Iterator[pb.DecodeResponse]:
        while (frame := self._frames.get()) is not None:
            self._take(frame)
            if self._answer is None:
                continue
            if frame.end_turn and not self._script.deaf:
                yield self._final(pb.FINISH_REASON_ENDED)
            yield from self._spend()
            if self._cut:
                return

    def _take(self, frame: pb.DecodeRequest) -> None:
        self._context += frame.token_ids
        self._check(frame)
        if frame.token_ids and self._answer is None:
            self._answer = iter(self._script.answers.pop(0))
        if len(self._context) > self._script.max_context:
            self._grpc.abort(grpc.StatusCode.OUT_OF_RANGE, "the context is full")
        if self._answer is not None:
            self._credit += frame.credit
            self._worker.most_outstanding = max(self._worker.most_outstanding, self._credit)
            self._credit += self._script.overspend

    def _check(self, frame: pb.DecodeRequest) -> None:
        """The frame is not too long, and has the rows that are due."""
        if len(frame.token_ids) > self._script.max_frame_tokens:
            self._grpc.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many tokens in a frame")
        due = b""
        if self._script.table is not None and (frame.token_ids or frame.embeddings):
            due = self._script.table[self._context[self._embedded :]].astype("<f4").tobytes()
            self._embedded = len(self._context)
        if frame.embeddings != due:
            self._grpc.abort(grpc.StatusCode.INVALID_ARGUMENT, "these are not the rows that are due")

    @property
    def _ready(self) -> bool:
        """Whether the next token could be computed."""
        return self._script.table is None or self._embedded == len(self._context)

    def _spend(self) -> Iterator[pb.DecodeResponse]:
        while self._credit and self._answer is not None and self._ready:
            token = next(self._answer, None)
            if token is None:
                return
            self._credit -= 1
            self._context.append(token)
            self._worker.tokens += 1
            if self._worker.tokens == self._script.fail_after:
                self._grpc.abort(grpc.StatusCode.DATA_LOSS, "whatever the peer says")
            if self._worker.tokens == self._script.cut_after:
                self._cut = True
                return
            top = [pb.Logprob(token_id=token, logprob=-0.5)]
            yield pb.DecodeResponse(token=pb.Token(token_id=token, logprob=-0.5, top=top))
            if token == EOS:
                yield self._final(pb.FINISH_REASON_EOS)

    def _final(self, reason: pb.FinishReason.ValueType) -> pb.DecodeResponse:
        self._answer, self._credit = None, 0
        return pb.DecodeResponse(
            final=pb.Final(reason=reason, context_tokens=len(self._context) + self._script.miscount)
        )


def scripted_workers() -> Iterator[Callable[[Script], FakeWorker]]:
    """What a fixture yields: starts workers, and stops them."""
    running: list[FakeWorker] = []

    def start(script: Script) -> FakeWorker:
        running.append(FakeWorker(script))
        return running[-1]

    yield start
    for worker in running:
        worker.stop()
