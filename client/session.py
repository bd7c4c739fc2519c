"""A session with the trusted worker: connect, attest, verify, open, decode; in this order and no other.

Only a `TrustedWorker` can open sessions, and it cannot be made without the `VerifiedPeer` that the attestation
policy hands out: every call is sealed for the key of that peer (wire/sealing.py). After a call was lost, and when the
worker has another key than it had, evidence is asked for and verified again before anything else is sent. (A connection
that gRPC renews meanwhile leads to the same key, or nothing opens.) The reply to Open must echo what was asked for, or
the session is refused. Every call has a deadline.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc

from client.adapter import Adapter
from client.attestation.fetch import fetch_from
from client.attestation.policy import Policy, VerifiedPeer, verify
from client.counters import Counters
from client.embedding import EmbeddingTable, own_table
from client.turn import DecodeStream, Pacing, Turn
from wire.binding import NONCE_BYTES
from wire.channel import CONNECT_SECONDS, client_options
from wire.errors import (
    DeniedError,
    InvalidArgumentError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    from_status,
)
from wire.sealing import ClientCall
from wire.v1 import gpu_worker_pb2, trusted_worker_pb2_grpc
from wire.v1 import trusted_worker_pb2 as pb

OPEN_SECONDS = 60.0
UPLOAD_SECONDS = 300.0
SESSION_BYTES = 16  # of a session's name
CLOSE_SECONDS = 3.0
POLL_SECONDS = 0.05
PRECISIONS = {"float32": gpu_worker_pb2.PRECISION_FLOAT32, "int8": gpu_worker_pb2.PRECISION_INT8}

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What a session is opened with. Zeros are neutral: greedy, no truncation, the most context there is."""

    model: str
    scheme: str
    precision: str
    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 0.0
    seed: int | None = None
    logprobs: int = 0
    max_context: int = 0
    perturbation: float = 0.0  # of released logits, at most
    model_folder: Path | None = None  # this client's own copy, for a worker that leaves embedding to its clients
    adapter: bytes = b""  # the name of one that the worker has
    adapter_folder: Path | None = None  # or one that is uploaded first

    def message(self) -> pb.OpenRequest:
        """The request as it travels."""
        return pb.OpenRequest(
            model=self.model,
            scheme=self.scheme,
            precision=PRECISIONS[self.precision],
            max_context=self.max_context,
            adapter=self.adapter,
            sampling=pb.Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed or 0,
                seeded=self.seed is not None,
                logprobs=self.logprobs,
                perturbation=self.perturbation,
            ),
        )


class Session:
    """One conversation's state on the trusted worker. `context` holds exactly the tokens that it holds."""

    def __init__(
        self, opened: pb.OpenResponse, stream: DecodeStream, table: EmbeddingTable | None, forget: Callable[[], None]
    ) -> None:
        self.context: list[int] = []
        self._opened = opened
        self._stream = stream
        self._table, self._forget = table, forget
        self._turn: Turn | None = None

    @property
    def ready(self) -> bool:
        """Whether the last turn, if any, was read to its end: only then is `context` known."""
        return self._turn is None or self._turn.finish_reason is not None

    def turn(self, token_ids: list[int], pacing: Pacing) -> Turn:
        """Append tokens to the context and decode. Raises InvalidArgumentError when an id cannot exist."""
        if not token_ids:
            raise InvalidArgumentError("there is nothing to send: the prompt has no tokens")
        if not all(0 <= token_id < self._opened.vocabulary for token_id in token_ids):
            raise InvalidArgumentError(
                f"a token id is out of range: this model's ids are 0 to {self._opened.vocabulary - 1}"
            )
        embed = self._table.rows if self._table else None
        self._turn = Turn(self._stream, self.context, pacing, embed)
        self._turn.begin(token_ids, max(self._opened.max_frame_tokens, 1))
        return self._turn

    def abandon(self) -> None:
        """From any thread: end its turn at once. Only `close` is of use afterwards."""
        self._stream.cancel()

    def close(self) -> None:
        """Free the session on the trusted worker; if it cannot be told, it will notice by itself."""
        self._stream.close()
        self._forget()
        if self._table:
            self._table.close()


class TrustedWorker:
    """A connection to a peer that the policy accepts, made by `connect`. A context manager."""

    def __init__(self, target: str, policy: Policy, seconds: float) -> None:
        """Raises UnauthenticatedError when the policy refuses the peer; nothing was sent by then."""
        self._target, self._policy, self._seconds = target, policy, seconds
        self._channel = grpc.insecure_channel(target, options=client_options())
        self._stub = trusted_worker_pb2_grpc.TrustedWorkerServiceStub(self._channel)
        self._lost = False  # a call of the verified peer was cut
        self._told: Callable[[], None] = lambda: None  # of losses
        self._adapters: dict[Path, bytes] = {}  # that were uploaded
        try:
            self.peer = self._verified()
        except BaseException:
            self._channel.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def renew(self, policy: Policy) -> None:
        """Ask for evidence again, and judge it by this policy. Raises as the constructor does; see there.

        After an error nothing is sent before evidence was accepted.
        """
        self._policy = policy
        self.peer = self._verified()

    def on_loss(self, told: Callable[[], None]) -> None:
        """Have `told` called, from any thread, whenever what answers next may be another machine."""
        self._told = told
        before = grpc.ChannelConnectivity.READY

        def changed(state: grpc.ChannelConnectivity) -> None:
            nonlocal before
            if before is grpc.ChannelConnectivity.READY and state is not before:
                self._lose()
            before = state

        self._channel.subscribe(changed)

    def open(self, request: Request) -> Session:
        """Open a session, after an upload of its adapter if the worker has not got it.

        Raises DeniedError when the reply does not echo the request, PreconditionError when embedding is left to this
        client and its copy of the model cannot serve for it, UnauthenticatedError when the peer is not the one that was
        verified, and the policy refuses the one that it is.
        """
        folder = request.adapter_folder
        if folder is None:
            return self._to_verified(lambda: self._open(request))
        known = folder in self._adapters
        name = self._adapters[folder] if known else self.upload(folder)
        try:
            return self._to_verified(lambda: self._open(replace(request, adapter=name)))
        except PreconditionError:
            del self._adapters[folder]
            if not known:
                raise
            return self.open(request)  # the worker has started anew since, or gave its place to another adapter

    def upload(self, folder: Path) -> bytes:
        """A LoRA adapter, in PEFT's layout: the name that sessions open with. Raises CheckpointError for other folders.

        Otherwise as `open`; InvalidArgumentError and ExhaustedError say what the worker does not take.
        """
        adapter = Adapter.read(folder)
        self._adapters[folder] = self._to_verified(lambda: self._upload(adapter))
        return self._adapters[folder]

    def _to_verified(self, attempt: Callable[[], T]) -> T:
        """A first call to the peer that was verified; if it became another one, to the one that is verified now."""
        if self._lost:
            self.peer = self._verified()
        try:
            return attempt()
        except UnauthenticatedError:  # it has another key than the one that was verified
            self.peer = self._verified()
            return attempt()
        except UnavailableError:
            self._lose()
            raise

    def _upload(self, adapter: Adapter) -> bytes:
        call = ClientCall(self.peer.hpke_key, "Upload")
        frames = (call.wrap(request) for request in adapter.requests())
        answer = _call(lambda: self._stub.Upload(frames, timeout=UPLOAD_SECONDS))
        return call.open(answer, pb.UploadResponse).adapter

    def _open(self, request: Request) -> Session:
        peer, call, asked = self.peer, ClientCall(self.peer.hpke_key, "Open"), request.message()
        sealed = call.wrap(asked)
        opened = call.open(_call(lambda: self._stub.Open(sealed, timeout=OPEN_SECONDS)), pb.OpenResponse)
        _check_echo(asked, opened)
        key = peer.hpke_key, opened.session, call.secret
        try:
            table = own_table(request.model_folder, request.precision, opened) if opened.client_embeds else None
        except BaseException:
            self.forget(*key)
            raise
        seal = ClientCall(peer.hpke_key, "Decode", opened.session, call.secret)
        stream = DecodeStream(self._stub.Decode, seal, self._lose)
        return Session(opened, stream, table, lambda: self.forget(*key))

    def _verified(self) -> VerifiedPeer:
        self._lost = False  # a call that is cut from here on counts
        rules = self._policy.rules
        nonce = os.urandom(NONCE_BYTES) if rules is None or rules.require_fresh_nonce else b""
        try:
            provider, offer = fetch_from(self._stub, self._target, nonce, self._seconds)
            return verify(self._target, provider, self._policy, offer)
        except BaseException:
            self._lose()
            raise

    def _lose(self) -> None:
        """A call was cut, or the peer refused: whatever answers next may be another machine."""
        self._lost = True
        self._told()

    def counters(self) -> Counters:
        """The worker's counters now."""
        return Counters.of(_call(lambda: self._stub.Stats(pb.StatsRequest(), timeout=CONNECT_SECONDS)))

    def await_pads(self, count: int, seconds: float, progress: Callable[[str, float], None]) -> float:
        """Wait for `count` pads in stock, or half of what the bank holds; it need not fill itself. Seconds waited.

        A worker that just started has none and would compute inside: this gives its idle time a moment.
        """
        started = time.monotonic()
        while (waited := time.monotonic() - started) < seconds:
            counters = self.counters()
            if counters.pads_in_stock >= min(count, counters.pads_capacity // 2):
                break
            progress("making one-time pads", waited)
            time.sleep(POLL_SECONDS)
        return waited

    def forget(self, hpke_key: bytes, session: bytes, secret: bytes) -> None:
        """Tell the worker to free a session, as far as it still listens."""
        sealed = ClientCall(hpke_key, "Close", session, secret).wrap(pb.CloseRequest())
        with contextlib.suppress(grpc.RpcError):
            self._stub.Close(sealed, timeout=CLOSE_SECONDS)


def connect(target: str, policy: Policy, seconds: float = CONNECT_SECONDS) -> TrustedWorker:
    """Connect and attest. Raises UnauthenticatedError when the policy refuses the peer; nothing was sent by then."""
    return TrustedWorker(target, policy, seconds)


def _check_echo(asked: pb.OpenRequest, opened: pb.OpenResponse) -> None:
    if not opened.vocabulary or not opened.max_frame_tokens or len(opened.session) != SESSION_BYTES:
        raise DeniedError("the trusted worker opened a session without name or vocabulary, or one that takes no tokens")
    wanted = (asked.model, asked.scheme, asked.precision, asked.adapter)
    if (opened.model, opened.scheme, opened.precision, opened.adapter) != wanted:
        raise DeniedError("the trusted worker opened another model, scheme, precision or adapter than was asked for")
    if opened.perturbation < asked.sampling.perturbation:
        raise DeniedError("the trusted worker perturbs logits less than was asked for")


def _call(call: Callable[[], T]) -> T:
    try:
        return call()
    except grpc.RpcError as error:
        status: Any = error
        raise from_status(status.code(), status.details()) from error
