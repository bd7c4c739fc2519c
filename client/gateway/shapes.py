"""What answers look like: the objects of OpenAI's two APIs, whole and in chunks. Pure functions of events.

Each object has one additive field, `cleave`: scheme, precision, provider, whether hardware was verified, the age of the
evidence in seconds, and the products that were verified meanwhile (for all clients of the trusted worker). Streams have
it in their last chunk.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from client.gateway.generation import End, Piece
from client.gateway.requests import Order
from client.turn import Token

Spell = Callable[[int], str]  # a token's text
Json = dict[str, Any]

_HALF = "\ufffd"
_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


class Shape(ABC):
    """The objects of one answer to `order`."""

    prefix = kind = chunk_kind = ""

    def __init__(self, order: Order, spell: Spell) -> None:
        self._order, self._spell = order, spell
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}

    @abstractmethod
    def _whole(self, text: str, tokens: Sequence[Token], reason: str) -> Json:
        """The choice of a whole answer."""

    @abstractmethod
    def _part(self, text: str, tokens: Sequence[Token], reason: str | None) -> Json:
        """The choice of a chunk."""

    def first(self) -> Iterator[Json]:
        """Chunks that come before any text."""
        yield from ()

    def piece(self, piece: Piece) -> Json:
        """The chunk of a piece of text."""
        return self._chunk(self._part(piece.text, piece.tokens, None))

    def last(self, end: End) -> Iterator[Json]:
        """The chunk that says why the answer ended; then, where it is wanted, one with the usage."""
        last = self._chunk(self._part("", end.tokens, _REASONS.get(end.reason, "stop")))
        if not self._order.include_usage:
            yield last | self._cleave(end)
            return
        yield last
        yield {**self._object(self.chunk_kind), "choices": [], "usage": _usage(end), **self._cleave(end)}

    def whole(self, pieces: Sequence[Piece], end: End) -> Json:
        """The answer as one object."""
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens] + list(end.tokens)
        choice = self._whole(text, tokens, _REASONS.get(end.reason, "stop"))
        return {**self._object(self.kind), "choices": [choice], "usage": _usage(end), **self._cleave(end)}

    def _chunk(self, choice: Json) -> Json:
        usage = {"usage": None} if self._order.include_usage else {}
        return {**self._object(self.chunk_kind), "choices": [choice], **usage}

    def _object(self, kind: str) -> Json:
        return {**self._head, "object": kind, "model": self._order.request.model}

    def _cleave(self, end: End) -> Json:
        request, peer = self._order.request, end.peer
        return {
            "cleave": {
                "scheme": request.scheme,
                "precision": request.precision,
                "provider": peer.provider,
                "verified": peer.verified,
                "evidence_age_seconds": round((datetime.now(UTC) - peer.at).total_seconds(), 3),
                "products_verified": end.products_verified,
            }
        }


class ChatShape(Shape):
    """Objects of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> Iterator[Json]:  # noqa: D102
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield self._chunk(choice)

    def _whole(self, text: str, tokens: Sequence[Token], reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _part(self, text: str, tokens: Sequence[Token], reason: str | None) -> Json:
        delta = {"content": text} if text else {}
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self._order.logprobs:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> Json:
        top = [self._spelled(token_id, logprob) for token_id, logprob in token.top]
        return {**self._spelled(token.token_id, token.logprob), "top_logprobs": top}

    def _spelled(self, token_id: int, logprob: float) -> Json:
        """`bytes` is null where a token is no whole characters: the tokenizer tells us no bytes."""
        text = self._spell(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if _HALF in text else list(text.encode())}


class CompletionShape(Shape):
    """Objects of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, order: Order, spell: Spell) -> None:
        super().__init__(order, spell)
        self._offset = 0  # of the next token, in characters of the answer

    def _whole(self, text: str, tokens: Sequence[Token], reason: str) -> Json:
        return {"index": 0, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _part(self, text: str, tokens: Sequence[Token], reason: str | None) -> Json:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self._order.logprobs:
            return None
        texts, offsets = [self._spell(token.token_id) for token in tokens], []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._spell(one): logprob for one, logprob in token.top} for token in tokens],
            "text_offset": offsets,
        }


def _usage(end: End) -> Json:
    prompt, completion = end.prompt_tokens, end.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
