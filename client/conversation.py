"""A conversation over sessions: sends only what the trusted worker does not know yet.

Before each turn the whole conversation is rendered. If its ids begin with exactly the context that the session
holds, the rest is sent and the cached keys and values are used again; otherwise (the answer was cut at a stop
string, or its text tokenises differently) a fresh session gets all of it.
"""

from collections.abc import Iterator, Sequence

from client.answer import Answer
from client.session import Request, Session, TrustedWorker
from client.tokenizer import Tokenizer
from client.turn import Pacing


class Conversation:
    """The messages so far and the session that holds them."""

    def __init__(
        self, worker: TrustedWorker, request: Request, tokenizer: Tokenizer, pacing: Pacing, stops: Sequence[str]
    ) -> None:
        self.worker = worker
        self.request = request
        self.answer: Answer | None = None  # the last one, or the one that is being given
        self._tokenizer = tokenizer
        self._pacing = pacing
        self._stops = stops
        self._messages: list[dict[str, str]] = []
        self._session: Session | None = None

    def ask(self, prompt: str) -> Iterator[str]:
        """Yield the answer's text. A turn that fails leaves the conversation as it was before it."""
        messages = [*self._messages, {"role": "user", "content": prompt}]
        try:
            yield from self._answer(self._tokenizer.chat(messages))
        except BaseException:
            self._close()
            raise
        text = self.answer.text if self.answer else None
        self._messages = [*messages, {"role": "assistant", "content": text or ""}]

    def reset(self) -> None:
        """Forget everything, here and on the trusted worker."""
        self._messages = []
        self._close()

    def _answer(self, token_ids: list[int]) -> Iterator[str]:
        session, rest = self._continue(token_ids)
        self.answer = Answer(self.worker, session, self._tokenizer.detokenizer(), self._stops)
        yield from self.answer.stream(rest, self._pacing)

    def _continue(self, token_ids: list[int]) -> tuple[Session, list[int]]:
        """The session to use and the ids that it lacks."""
        session = self._session
        if session and session.ready:
            known = len(session.context)
            if known < len(token_ids) and token_ids[:known] == session.context:
                return session, token_ids[known:]
        self._close()
        self._session = self.worker.open(self.request)
        return self._session, token_ids

    def _close(self) -> None:
        if self._session:
            self._session.close()
        self._session = None
