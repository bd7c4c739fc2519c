"""Answers for many clients at once: each is a session of its own, driven by a thread of its own.

The sessions of client/session.py wait in threads; the event loop gets what comes out of them. Whoever stops listening
cancels: the turn ends, the session is closed, and its memory is free again.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from client.answer import Answer
from client.attestation.policy import VerifiedPeer
from client.gateway.link import Link
from client.gateway.requests import Order
from client.session import Request, Session, TrustedWorker
from client.tokenizer import Tokenizer
from client.turn import Pacing, Token
from wire.errors import CleaveError, ContextError, ExhaustedError

MOST = 64  # answers at once: a trusted worker takes no more sessions
TICK_SECONDS = 10.0  # longest silence towards a client that waits


@dataclass(frozen=True)
class Model:
    """What is served, and how its answers are driven."""

    base: Request  # model, scheme and precision of every session
    context: int  # tokens
    tokenizer: Tokenizer
    credit: int  # most tokens in flight
    step_seconds: float  # longest wait for a token


@dataclass(frozen=True)
class Piece:
    """Text that is ready, and the tokens that it came in."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class End:
    """The answer is complete. `tokens` are those that no piece has, but for a stop string's and the end of sequence."""

    tokens: tuple[Token, ...]
    reason: str
    prompt_tokens: int
    completion_tokens: int
    products_verified: int
    seconds: float
    time_to_first_token: float
    peer: VerifiedPeer


Event = Piece | End
Events = AsyncGenerator[Event | None, None]  # None: nothing came for a while
Emit = Callable[[Event | CleaveError], None]


class Generation:
    """One answer. `run` blocks; `cancel` may come from any thread, at any time."""

    def __init__(self, worker: TrustedWorker, model: Model, order: Order, emit: Emit) -> None:
        self._worker, self._model, self._order, self._emit = worker, model, order, emit
        self._session: Session | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """End it early, wherever it is: a worker that is silent is not waited for."""
        self._cancelled = True
        if self._session:
            self._session.abandon()

    def run(self) -> None:
        """Drive it to its end. Its error is the last event, where there is one."""
        try:
            self._run()
        except CleaveError as error:
            self._emit(error)
        except Exception as error:
            self._emit(CleaveError(f"internal error of the gateway: {type(error).__name__}"))

    def _run(self) -> None:
        ids = self._order.tokens(self._model.tokenizer)
        if len(ids) >= self._model.context:
            raise ContextError(f"the prompt has {len(ids)} tokens, and the model's context {self._model.context}")
        self._session = session = self._worker.open(self._order.request)
        try:
            if not self._cancelled:
                self._stream(Answer(self._worker, session, self._model.tokenizer.detokenizer(), self._order.stops), ids)
        finally:
            session.close()

    def _stream(self, answer: Answer, ids: list[int]) -> None:
        sent, pacing = 0, Pacing(self._model.credit, self._order.max_new_tokens, self._model.step_seconds)
        for piece in answer.stream(ids, pacing):
            self._emit(Piece(piece, tuple(answer.tokens[sent:])))
            sent = len(answer.tokens)
        rest = [] if answer.stopped else answer.tokens[sent:]
        if rest and answer.finish_reason == "eos":
            rest.pop()  # it is no part of the text
        self._emit(
            End(
                tuple(rest),
                answer.finish_reason or "ended",
                answer.prompt_tokens,
                len(answer.tokens),
                answer.difference("products_verified"),
                answer.seconds,
                answer.time_to_first_token,
                self._worker.peer,
            )
        )


class Generations:
    """All answers that are under way. Belongs to the event loop; close it when that ends."""

    def __init__(self, link: Link, model: Model) -> None:
        self.running = 0
        self._link, self._model = link, model
        self._pool = ThreadPoolExecutor(MOST, thread_name_prefix="answer")

    def close(self) -> None:
        """Take no more; those that run end with their connection."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def events(self, order: Order) -> Events:
        """Pieces and the End; None after every TICK_SECONDS of silence. Closing it cancels the answer.

        Raises CleaveError: NotVerifiedError before anything was done, ExhaustedError when too many run already.
        """
        worker = await self._link.worker()
        if self.running >= MOST:
            raise ExhaustedError(f"{MOST} answers are under way, which is the most: try again in a moment")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event | CleaveError]()

        def emit(event: Event | CleaveError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, event)

        generation = Generation(worker, self._model, order, emit)
        self.running += 1
        done = loop.run_in_executor(self._pool, generation.run)
        done.add_done_callback(lambda _: self._leave())
        try:
            while True:
                event = await _next(queue)
                if isinstance(event, CleaveError):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            generation.cancel()

    def _leave(self) -> None:
        self.running -= 1


async def _next(queue: "asyncio.Queue[Event | CleaveError]") -> Event | CleaveError | None:
    try:
        return await asyncio.wait_for(queue.get(), TICK_SECONDS)
    except TimeoutError:
        return None
