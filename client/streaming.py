"""Text out of a stream of tokens: no half characters, no special tokens, and nothing past a stop string."""

from collections.abc import Callable, Iterable, Sequence

_HALF = "\ufffd"  # what decoding gives for the bytes of an unfinished character


class Detokenizer:
    """Incremental decoding. Text is held back while it ends in an unfinished character.

    Each step decodes a short window that starts one emitted piece back: some tokenizers spell a token differently
    at the start of a text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._settled = 0  # tokens of the window whose text is out

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
        self._window.append(token_id)
        before = self._decode(self._window[: self._settled])
        now = self._decode(self._window)
        if now.endswith(_HALF) or len(now) <= len(before):
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return now[len(before) :]

    def flush(self) -> str:
        """What is still held back, without the unfinished character at its end."""
        before = self._decode(self._window[: self._settled])
        now = self._decode(self._window).rstrip(_HALF)
        self._window, self._settled = [], 0
        return now[len(before) :]


class StopFilter:
    """Passes text on up to the first stop string, which may begin in one piece and end in another."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that certainly stands before any stop string."""
        if self.stopped:
            return ""
        self._held += piece
        found = _cut(self._held, self._stops)
        if found is not None:
            self.stopped = True
            return self._take(found)
        return self._take(len(self._held) - max(map(self._overlap, self._stops), default=0))

    def flush(self) -> str:
        """The rest, once nothing more will come."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def _cut(text: str, stops: Iterable[str]) -> int | None:
    """Where the stop string begins that is complete first: what tokens the text came in must not matter."""
    return min(((at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0), default=(0, None))[1]
