"""The terminal: what may be written to it, and how. Escape codes only where there is one.

Text from a model or a peer loses its control characters: it must not drive the user's terminal.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """The text without control characters, except tabs and line ends."""
    return _CONTROL.sub("", text)


def one_line(text: str) -> str:
    """Harmless, and in one line: for errors."""
    return " ".join(harmless(text).split())


def note(text: str) -> None:
    """A line on stderr, dim on a terminal."""
    print(f"\x1b[2m{text}\x1b[0m" if _styled() else text, file=sys.stderr, flush=True)


def red(text: str) -> str:
    """The text for a place in a note, bright red on a terminal: what a user must not overlook."""
    return f"\x1b[0;1;31m{text}\x1b[0;2m" if _styled() else text


def _styled() -> bool:
    """Whether stderr is a terminal, and its user wants more than plain text there (NO_COLOR)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def size(count: float) -> str:
    """Bytes for people: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if round(count, 1) < 1024:  # 1023.96 MiB is 1.0 GiB, and not 1024.0 MiB
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class Progress:
    """Shows what is being waited for: one line that is rewritten on a terminal, one line per stage elsewhere.

    `rewrite` False, where others write to the terminal too, gives a line per stage there as well.
    """

    def __init__(self, to: TextIO, rewrite: bool = True) -> None:
        self._to = to
        self._rewrite = rewrite and to.isatty()
        self._stage = ""

    def __call__(self, stage: str, seconds: float) -> None:
        """`stage` has been going on for `seconds`."""
        if self._rewrite:
            self._to.write(f"\r\x1b[2K\x1b[2m{stage} ({seconds:.0f} s)\x1b[0m")
        elif stage != self._stage:
            self._to.write(f"{stage}\n")
        self._stage = stage
        self._to.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self._stage and self._rewrite:
            self._to.write("\r\x1b[2K")
            self._to.flush()
        self._stage = ""


def quiet(stage: str, seconds: float) -> None:
    """The progress of somebody who does not want to see any."""


def unwind_on_signals() -> None:
    """SIGTERM and SIGHUP unwind like an error, once, so that workers are stopped and folders removed.

    What is ignored stays so: `nohup` ignores SIGHUP for what it starts.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # another one would end the unwinding half-way
    raise SystemExit(128 + number)


@contextlib.contextmanager
def first_interrupt(handle: Callable[[], None]) -> Iterator[None]:
    """Within the block the first Ctrl-C calls `handle`, and only the second raises KeyboardInterrupt."""

    def handler(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        handle()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
