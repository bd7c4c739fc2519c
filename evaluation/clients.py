"""The clients of a soak: each asks, thinks, walks away now and then, and compares every answer with its reference."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from client.attestation.policy import Policy
from client.session import Request, Session, TrustedWorker, connect
from client.turn import Pacing
from evaluation.judge import Failure

TOKEN_SECONDS = 120.0  # longest wait for a token
THINKING = (0.0, 0.5, 3.0, 8.0)  # seconds between conversations: crowds, and idle time for the trusted worker
RETRY_SECONDS = 0.5
LEAVING = 0.1  # share of answers whose end is not waited for
PROMPTS, ANSWERS = (1, 3, 10, 30, 90), (4, 12, 40)  # tokens


@dataclass(frozen=True)
class Turn:
    """A prompt, how many tokens may follow, and those that do."""

    prompt: tuple[int, ...]
    most: int
    answer: tuple[int, ...] = ()


Conversation = tuple[Turn, ...]


def conversations(vocabulary: int, count: int, pick: random.Random) -> list[Conversation]:
    """Prompts and answers of very different lengths; every third conversation has a second turn."""

    def turn() -> Turn:
        prompt = tuple(pick.randrange(vocabulary) for _ in range(pick.choice(PROMPTS)))
        return Turn(prompt, pick.choice(ANSWERS))

    return [tuple(turn() for _ in range(1 if number % 3 else 2)) for number in range(count)]


def answered(worker: TrustedWorker, request: Request, conversation: Conversation) -> Conversation:
    """The conversation with its answers."""
    with _session(worker, request) as session:
        return tuple(
            replace(turn, answer=tuple(token.token_id for token in session.turn(list(turn.prompt), _pacing(turn))))
            for turn in conversation
        )


class Client(threading.Thread):
    """Asks until `stopping` is set. What it saw may be read when it has ended, `completed` at any time."""

    def __init__(
        self,
        number: int,
        target: str,
        request: Request,
        known: list[Conversation],
        stopping: threading.Event,
        seed: int,
    ) -> None:
        super().__init__(name=f"client {number}", daemon=True)
        self.number = number
        self.completed = self.left = 0
        self.wrong: list[str] = []
        self.failures: list[Failure] = []
        self._target, self._request, self._known, self._stopping = target, request, known, stopping
        self._pick = random.Random(seed)  # noqa: S311  (nothing secret)
        self._worker: TrustedWorker | None = None
        self._begun = 0.0  # when the answer of now was asked for

    def run(self) -> None:
        """The loop."""
        while not self._stopping.is_set():
            pause = self._pick.choice(THINKING)
            try:
                self._converse(self._pick.choice(self._known))
            except Exception as error:
                self.failures.append(Failure(self.number, self._begun, time.monotonic(), error))
                self._hang_up()
                pause = RETRY_SECONDS
            self._stopping.wait(pause)
        self._hang_up()

    def _converse(self, conversation: Conversation) -> None:
        self._begun = time.monotonic()
        self._worker = self._worker or connect(self._target, Policy())
        with _session(self._worker, self._request) as session:
            for turn in conversation:
                self._begun = time.monotonic()
                if not self._answer(session, turn):
                    return

    def _answer(self, session: Session, turn: Turn) -> bool:
        """False when the client did not wait for the end."""
        leave_after = self._pick.randrange(turn.most) if self._pick.random() < LEAVING else turn.most
        tokens: list[int] = []
        try:
            for token in session.turn(list(turn.prompt), _pacing(turn)):
                tokens.append(token.token_id)
                if len(tokens) > leave_after:
                    self._compare(tokens, turn.answer[: len(tokens)])
                    self.left += 1
                    return False
        except Exception:
            self._compare(tokens, turn.answer[: len(tokens)])  # what was said before a failure must be right, too
            raise
        self._compare(tokens, turn.answer)
        self.completed += 1
        return True

    def _compare(self, tokens: list[int], expected: tuple[int, ...]) -> None:
        if tuple(tokens) != expected:
            self.wrong.append(f"client {self.number} got {tokens}, alone it was {list(expected)}")

    def _hang_up(self) -> None:
        if self._worker is not None:
            with self._worker:  # leaving it closes the connection
                self._worker = None


@contextlib.contextmanager
def _session(worker: TrustedWorker, request: Request) -> Iterator[Session]:
    session = worker.open(request)
    try:
        yield session
    finally:
        session.close()


def _pacing(turn: Turn) -> Pacing:
    return Pacing(max_new_tokens=turn.most, step_seconds=TOKEN_SECONDS)
