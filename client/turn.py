"""One answer, token by token: the Decode stream and the credit that paces it.

The server sends at most as many tokens as it was granted. A turn grants so that no more than `credit` tokens are
ever outstanding and never more than `max_new_tokens` in total, and it reads until FINAL: only then do both sides
know the same context. Tokens that arrive after `end` was called belong to the context, not to the answer.

Where the client embeds, a token's embedding travels with its id, or in a frame of its own as soon as the server has
sent the token, whatever has become of the turn: so every token of `context` has exactly one, between turns too.

Every frame is sealed (wire/sealing.py): what does not open in its place ends the session, and so does a stream that
ends before its FINAL.

The stream is read by a thread of its own, so every wait here has a deadline and a signal handler may call `end`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from wire.errors import (
    CleaveError,
    DeadlineError,
    InvalidArgumentError,
    UnavailableError,
    VerificationError,
    from_status,
)
from wire.sealing import ClientCall
from wire.v1 import trusted_worker_pb2 as pb

Embed = Callable[[Sequence[int]], bytes]  # tokens to their embeddings, one after the other

_FINISH = {pb.FINISH_REASON_EOS: "eos", pb.FINISH_REASON_CONTEXT: "context"}


@dataclass(frozen=True)
class Token:
    """One token of the answer. Log-probabilities are meaningful only when the session asked for them."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Pacing:
    """How a turn is driven."""

    credit: int = 8  # most tokens outstanding
    max_new_tokens: int = 256
    step_seconds: float = 120.0  # longest wait for the next frame


class DecodeStream:
    """The Decode call of one session, open over several turns. Close it when done, or after any error."""

    def __init__(
        self, decode: Callable[[Iterator[pb.Sealed]], Any], seal: ClientCall, lost: Callable[[], None]
    ) -> None:
        """`lost` is called, from another thread, when the call ends as if somebody else had the connection."""
        self._seal, self._lost = seal, lost
        self._requests: SimpleQueue[pb.DecodeRequest | None] = SimpleQueue()  # its put is safe in a signal handler
        self._responses: SimpleQueue[pb.DecodeResponse | CleaveError] = SimpleQueue()
        self._call = decode(self._sealed())
        self._reader = threading.Thread(target=self._read, name="decode-reader", daemon=True)
        self._reader.start()

    def send(self, request: pb.DecodeRequest) -> None:
        """Queue a frame; frames leave in this order."""
        self._requests.put(request)

    def receive(self, seconds: float) -> pb.DecodeResponse:
        """The next frame. Raises DeadlineError when none came in time, or what the peer's status stands for."""
        try:
            response = self._responses.get(timeout=seconds)
        except Empty:
            raise DeadlineError(
                f"the trusted worker sent nothing for {seconds:g} s: it may be overloaded; --timeout waits longer"
            ) from None
        if isinstance(response, CleaveError):
            raise response
        return response

    def cancel(self) -> None:
        """End the call without a wait, from any thread: whoever reads gets an error now. It still wants a `close`."""
        self._call.cancel()

    def close(self) -> None:
        """End the call; the server frees the session's step."""
        self._call.cancel()  # first: a server that ends it because no more is to come would look like a loss
        self._requests.put(None)
        self._reader.join(timeout=5)

    def _sealed(self) -> Iterator[pb.Sealed]:
        while (request := self._requests.get()) is not None:
            yield self._seal.wrap(request)

    def _read(self) -> None:
        try:
            for sealed in self._call:
                self._responses.put(self._seal.open(sealed, pb.DecodeResponse))
            self._fail(UnavailableError("the conversation was cut before the end of its answer came"))
        except CleaveError as error:
            self._fail(error)
        except grpc.RpcError as error:
            self._fail(from_status(error.code(), error.details()), ours=error.code() is grpc.StatusCode.CANCELLED)

    def _fail(self, error: CleaveError, ours: bool = False) -> None:
        if isinstance(error, UnavailableError | VerificationError) and not ours:
            self._lost()
        self._responses.put(error)


class Turn:
    """Iterates over the tokens of one answer. `finish_reason` is set once the iteration has ended by itself.

    It is one of eos, length, stop, interrupted, context. `embed` is None where the trusted worker embeds.
    """

    def __init__(self, stream: DecodeStream, context: list[int], pacing: Pacing, embed: Embed | None = None) -> None:
        self.finish_reason: str | None = None
        self._stream = stream
        self._context = context
        self._pacing = pacing
        self._embed = embed
        self._granted = 0
        self._received = 0
        self._ended: str | None = None

    def begin(self, token_ids: list[int], max_frame_tokens: int) -> None:
        """Send the new tokens, in as many frames as they need; only the last one carries credit."""
        for start in range(0, len(token_ids), max_frame_tokens):
            ids = token_ids[start : start + max_frame_tokens]
            last = start + max_frame_tokens >= len(token_ids)
            self._send(ids, self._due() if last else 0, embedded=ids)
        self._context.extend(token_ids)

    def end(self, reason: str) -> None:
        """Ask for FINAL; the iteration then drains. Safe in a signal handler, and more than once."""
        if self._ended is None and self.finish_reason is None:
            self._ended = reason
            self._stream.send(pb.DecodeRequest(end_turn=True))

    def __iter__(self) -> Iterator[Token]:
        while self.finish_reason is None:
            response = self._stream.receive(self._pacing.step_seconds)
            if response.HasField("final"):
                self._finish(response.final)
            elif response.HasField("token"):
                wanted = self._ended is None
                self._account(response.token.token_id)
                if wanted:
                    top = tuple((entry.token_id, entry.logprob) for entry in response.token.top)
                    yield Token(response.token.token_id, response.token.logprob, top)
            else:
                raise InvalidArgumentError("the trusted worker sent an empty frame")

    def _account(self, token_id: int) -> None:
        self._context.append(token_id)
        self._received += 1
        if self._received > self._granted:
            raise InvalidArgumentError("the trusted worker sent more tokens than it was granted")
        if self._received == self._pacing.max_new_tokens:
            self.end("length")
        low = self._ended is None and self._granted - self._received <= self._pacing.credit // 2
        credit = self._due() if low else 0
        if credit or self._embed:
            self._send([], credit, embedded=[token_id])

    def _due(self) -> int:
        """The credit that pacing allows on top of what is granted."""
        outstanding = self._granted - self._received
        return min(self._pacing.credit - outstanding, self._pacing.max_new_tokens - self._granted)

    def _send(self, token_ids: list[int], credit: int, embedded: list[int]) -> None:
        """A frame with new tokens, credit, and the embeddings of `embedded`, where the client embeds."""
        self._granted += credit
        rows = self._embed(embedded) if self._embed else b""
        self._stream.send(pb.DecodeRequest(token_ids=token_ids, credit=credit, embeddings=rows))

    def _finish(self, final: pb.Final) -> None:
        if final.context_tokens != len(self._context):
            raise InvalidArgumentError("the trusted worker and this client count different contexts")
        self.finish_reason = _FINISH.get(final.reason) or self._ended or "ended"
