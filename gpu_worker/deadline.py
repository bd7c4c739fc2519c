"""A deadline that costs nothing until it is over: one timer for a whole stream looks at the clock now and then.

`asyncio.timeout` makes a timer for each use and cancels it again, which takes 25 us of an exchange of 500.
"""

import asyncio
from typing import Self

from wire.errors import DeadlineError

LOOKS = 4  # in the time that is allowed: a deadline is noticed late by at most one part of so many


class Deadline:
    """`with deadline:` around what the task that made it waits for. Raises DeadlineError there. `close` ends it."""

    def __init__(self, seconds: float, text: str) -> None:
        self._seconds, self._text, self._since = seconds, text, 0.0
        self._late, self._loop, self._task = False, asyncio.get_running_loop(), asyncio.current_task()
        self._timer = self._loop.call_later(seconds / LOOKS, self._look)

    def close(self) -> None:
        """No more looks."""
        self._timer.cancel()

    def __enter__(self) -> Self:
        self._since = self._loop.time()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._since = 0.0
        if self._late and self._task is not None and not self._task.uncancel() and kind is asyncio.CancelledError:
            raise DeadlineError(self._text) from None  # nobody but us wanted it to end

    def _look(self) -> None:
        if self._since and self._loop.time() - self._since > self._seconds and self._task is not None:
            self._late = self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds / LOOKS, self._look)
