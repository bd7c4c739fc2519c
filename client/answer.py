"""One answer: the turn's tokens as they come, their text, and what they cost.

Iterating yields text, ready to be shown; everything else is an attribute that is complete after the iteration.
Counters are differences of the trusted worker's Stats around the turn, so other clients' work would be in them.
"""

import time
from collections.abc import Iterator, Sequence

from client.session import Session, TrustedWorker
from client.streaming import Detokenizer, StopFilter
from client.turn import Pacing, Token, Turn


class Answer:
    """Drives one turn. Without a detokenizer there is no text: the iteration yields nothing, `text` stays None."""

    def __init__(
        self, worker: TrustedWorker, session: Session, detokenizer: Detokenizer | None, stops: Sequence[str]
    ) -> None:
        self.tokens: list[Token] = []
        self.text: str | None = None if detokenizer is None else ""
        self.prompt_tokens = 0
        self.seconds = 0.0
        self.time_to_first_token = 0.0
        self.before = self.after = worker.counters()
        self._worker = worker
        self._session = session
        self._detokenizer = detokenizer
        self._stop = StopFilter(stops)
        self._turn: Turn | None = None

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; None while it has not."""
        return self._turn.finish_reason if self._turn else None

    @property
    def stopped(self) -> bool:
        """Whether its text was cut at a stop string; the model may have ended at the same time."""
        return self._stop.stopped

    @property
    def tokens_per_second(self) -> float | None:
        """The decode rate: tokens after the first one, over the time after it. None for fewer than two tokens."""
        if len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / max(self.seconds - self.time_to_first_token, 1e-9)

    def difference(self, counter: str) -> int:
        """How far a counter moved during this answer."""
        return int(getattr(self.after, counter) - getattr(self.before, counter))

    @property
    def bytes_exchanged(self) -> int:
        """Bytes between trusted worker and GPU worker, both ways."""
        return self.difference("wire_bytes_up") + self.difference("wire_bytes_down")

    def interrupt(self) -> None:
        """End the answer early. Safe in a signal handler."""
        if self._turn:
            self._turn.end("interrupted")

    def stream(self, token_ids: list[int], pacing: Pacing) -> Iterator[str]:
        """Send the tokens and yield the answer's text piece by piece, until FINAL."""
        self.prompt_tokens = len(token_ids)
        started = time.monotonic()
        self._turn = self._session.turn(token_ids, pacing)
        for token in self._turn:
            self.seconds = time.monotonic() - started
            self.time_to_first_token = self.time_to_first_token or self.seconds
            self.tokens.append(token)
            yield from self._show(self._decode(token))
            if self._stop.stopped:
                self._turn.end("stop")
        if self._detokenizer:
            yield from self._show(self._stop.feed(self._detokenizer.flush()) + self._stop.flush())
        self.after = self._worker.counters()

    def _decode(self, token: Token) -> str:
        return self._stop.feed(self._detokenizer.feed(token.token_id)) if self._detokenizer else ""

    def _show(self, piece: str) -> Iterator[str]:
        if piece and self.text is not None:
            self.text += piece
            yield piece
