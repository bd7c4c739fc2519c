"""One conversation: its tokens, its cache, its credit. Only the compute thread touches it.

`pending` are tokens that are not in the cache yet: new ones from the client, or the one sampled last. A session can
step when it has something to prefill, or one token and credit for the answer to it. A turn starts with tokens from
the client and ends with one FINAL: at an end-of-sequence token, when the context is full, or when the client says so.

Where the client embeds (`width`), a pending token waits for its row of the embedding table too. Such rows wait in
ordinary memory, in order, and are bounded: finite, of bounded size, and few (the server reads no frame meanwhile).
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from trusted_worker.adapters import Adapter
from trusted_worker.arithmetic import F32
from trusted_worker.cache import Cache
from trusted_worker.metrics import Latencies
from trusted_worker.sampling import Sampler
from trusted_worker.secure_memory import Scratch
from wire.errors import CleaveError, ContextError, InvalidArgumentError, UnauthenticatedError, UnavailableError
from wire.model_config import ModelConfig
from wire.v1 import trusted_worker_pb2 as pb

Event = pb.DecodeResponse | CleaveError
Emit = Callable[[Event], None]


MAX_FRAME_TOKENS = MAX_CREDIT = 4096
EMBEDDING_FRAME_BYTES = 1 << 20  # of embeddings in one frame
EMBEDDING_LIMIT = 65504.0  # largest element of a client's embedding: the largest float16


class Session:
    """State machine of one session. `emit` receives tokens, FINALs and at most one error, after which it is dead."""

    def __init__(
        self,
        config: ModelConfig,
        cache: Cache,
        sampler: Sampler,
        scratch: Scratch,
        latencies: Latencies,
        secret: bytes = b"",
        client_embeds: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self.cache, self.secret, self.adapter = cache, secret, adapter
        if adapter:
            adapter.hold()
        self._scratch, self._latencies = scratch, latencies
        self._width = 4 * config.hidden if client_embeds else 0  # bytes of an embedding
        self._embeddings: deque[bytes] = deque()  # of the first pending tokens
        self._waits: float | None = None  # since when a token could be computed
        self._first = True  # the next token is a turn's first
        self.dead = False
        self._config, self._sampler = config, sampler
        self._emit: Emit | None = None
        self._tokens: list[int] = []
        self._pending: deque[int] = deque()
        self._taken: tuple[list[int], list[bytes]] = [], []
        self._credit = 0
        self._in_turn = False

    def attach(self, emit: Emit) -> None:
        """From now on events go to `emit`. A stream that held the session before is told, and ends."""
        if self._emit is not None:
            self._send(UnavailableError("another stream has taken over this session"))
        self._emit = emit

    @property
    def attached(self) -> bool:
        """Whether a client's stream holds the session."""
        return self._emit is not None

    def detach(self, emit: Emit) -> bool:
        """The stream is gone: stop the turn. A later attach may go on. False when another stream has taken over."""
        if self._emit is not emit:
            return False
        self._emit = None
        self._rest()
        return True

    @property
    def backlog(self) -> int:
        """Bytes of embeddings that wait for a step."""
        return len(self._embeddings) * self._width

    def feed(self, ids: Sequence[int], credit: int, end_turn: bool, embeddings: bytes = b"") -> None:
        """A client's frame. Raises InvalidArgumentError or ContextError; the session lives on unchanged then."""
        if self.dead:
            raise UnauthenticatedError("no such session")
        if len(ids) > MAX_FRAME_TOKENS:  # before they become objects
            raise InvalidArgumentError(f"a frame holds at most {MAX_FRAME_TOKENS} tokens")
        if any(token >= self._config.vocabulary for token in ids):
            raise InvalidArgumentError(f"token ids must be below {self._config.vocabulary}")
        held = self.cache.length + len(self._pending)
        if held + len(ids) > self.cache.capacity:
            room = max(self.cache.capacity - held, 0)
            raise ContextError(f"{len(ids)} more tokens do not fit: the context has room for {room}")
        if self._credit + credit > MAX_CREDIT:
            raise InvalidArgumentError(f"at most {MAX_CREDIT} tokens can be outstanding")
        self._embeddings.extend(self._checked(embeddings, len(ids)))
        if ids:
            self._first |= not self._in_turn
            self._latencies.prompt_tokens += len(ids)
            self._in_turn = True
            self._tokens.extend(ids)
            self._pending.extend(ids)
        if self._in_turn:
            self._credit += credit
            if self._credit and self._waits is None:
                self._waits = time.monotonic()
            if end_turn:
                self._finish(pb.FINISH_REASON_ENDED)

    @property
    def in_turn(self) -> bool:
        """Whether an answer is under way."""
        return self._in_turn and not self.dead

    @property
    def rows(self) -> int:
        """Rows that could go into a step now. The last pending token waits for credit."""
        if self.dead or not self._in_turn:
            return 0
        rows = len(self._pending) if self._credit else max(len(self._pending) - 1, 0)
        return min(rows, len(self._embeddings)) if self._width else rows

    def take(self, rows: int) -> tuple[list[int], list[bytes], bool]:
        """The next `rows` tokens to compute, their embeddings, and whether the last one's logits are wanted."""
        ids = [self._pending.popleft() for _ in range(rows)]
        embeddings = [self._embeddings.popleft() for _ in range(rows if self._width else 0)]
        self._taken = ids, embeddings
        return ids, embeddings, not self._pending

    def put_back(self) -> None:
        """What was taken last was not computed, for no fault of this session: it will be taken again."""
        ids, embeddings = self._taken
        self._pending.extendleft(reversed(ids))
        self._embeddings.extendleft(reversed(embeddings))

    def accept(self, logits: F32) -> None:
        """Sample from the logits of the last token, and hand the result to the client."""
        choice = self._sampler.choose(logits, self._tokens, self._scratch)
        self._observe()
        self._tokens.append(choice.token)
        self._pending.append(choice.token)
        if not self._in_turn:  # the client left during the step: the token is part of the context, unsent
            return
        self._credit -= 1
        self._waits = time.monotonic() if self._credit else None
        top = [pb.Logprob(token_id=token, logprob=logprob) for token, logprob in choice.top]
        self._send(pb.DecodeResponse(token=pb.Token(token_id=choice.token, logprob=choice.logprob, top=top)))
        if choice.token in self._config.eos:
            self._finish(pb.FINISH_REASON_EOS)
        elif self.cache.length + len(self._pending) >= self.cache.capacity:
            self._finish(pb.FINISH_REASON_CONTEXT)

    def fail(self, error: CleaveError) -> None:
        """The session ends with this error."""
        if not self.dead:
            self._send(error)
            self.close()

    def close(self) -> None:
        """Wipe and give back what the session holds."""
        if not self.dead:
            self.dead = True
            self.cache.free()
            if self.adapter:
                self.adapter.release()
            self._tokens.clear()
            self._pending.clear()
            self._embeddings.clear()
            self._taken = [], []

    def _checked(self, embeddings: bytes, tokens: int) -> list[bytes]:
        """A frame's embeddings, row by row. Raises InvalidArgumentError for anything but what is due."""
        if not self._width:
            if embeddings:
                raise InvalidArgumentError("this worker embeds tokens itself: send none")
            return []
        due = len(self._pending) + tokens - len(self._embeddings)
        if len(embeddings) != due * self._width and (tokens or embeddings):
            raise InvalidArgumentError(f"the client embeds here: {due} rows of {self._width} bytes are due")
        values = np.frombuffer(embeddings, "<f4")
        if not -EMBEDDING_LIMIT <= values.min(initial=0) <= values.max(initial=0) <= EMBEDDING_LIMIT:
            raise InvalidArgumentError("an embedding is not finite, or too large")
        return [embeddings[start : start + self._width] for start in range(0, len(embeddings), self._width)]

    def _finish(self, reason: pb.FinishReason.ValueType) -> None:
        self._rest()
        self._send(pb.DecodeResponse(final=pb.Final(reason=reason, context_tokens=len(self._tokens))))

    def _observe(self) -> None:
        """A token is there: how long it took since it could be computed."""
        self._latencies.generated_tokens += 1
        if self._waits is not None:
            histogram = self._latencies.first_token if self._first else self._latencies.next_token
            histogram.observe(time.monotonic() - self._waits)
        self._first = False

    def _rest(self) -> None:
        """The turn is over."""
        self._in_turn, self._credit, self._waits = False, 0, None
        if not self.dead:
            self.cache.rest()

    def _send(self, event: Event) -> None:
        if self._emit is not None:
            try:
                self._emit(event)
            except RuntimeError:  # the event loop that would deliver it is closed
                self._emit = None
