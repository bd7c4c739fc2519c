"""A child process that announces its state on stdout and dies with this one.

The child runs in a session of its own, so a Ctrl-C in the terminal reaches only the parent, which decides. Both of
its pipes are read by threads: a full pipe never blocks it. The last lines of stderr are kept for the report of its end.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import IO, TextIO

from wire.errors import DeadlineError, UnavailableError

STOP_SECONDS = 5.0
TAIL_LINES = 5
USAGE_STATUS = 2
_TICK_SECONDS = 1.0

Progress = Callable[[str, float], None]  # (what is waited for, seconds so far)


class Child:
    """A running child. `ended` is called, from a thread, when it is gone."""

    def __init__(
        self, name: str, argv: Sequence[str], folder: Path, log: TextIO | None, ended: Callable[[], None]
    ) -> None:
        self.name = name
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._lines: Queue[str | None] = Queue()
        self._log = log
        self._ended = ended
        self._process = subprocess.Popen(
            [sys.executable, *argv, "--parent", str(os.getpid())],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._pumps = [
            self._pump(self._process.stdout, self._announce, at_end=self._finish),
            self._pump(self._process.stderr, self._keep, at_end=lambda: None),
        ]

    def await_line(self, prefix: str, seconds: float, stage: str, progress: Progress) -> str:
        """Wait for a stdout line that starts with `prefix`, and return the rest of it.

        Raises UnavailableError when the child ends before, DeadlineError when the time is over.
        """
        started = time.monotonic()
        while (waited := time.monotonic() - started) < seconds:
            progress(stage, waited)
            with contextlib.suppress(Empty):
                line = self._lines.get(timeout=min(_TICK_SECONDS, seconds - waited))
                if line is None:
                    raise UnavailableError(self.epitaph())
                if line.startswith(prefix):
                    return line.removeprefix(prefix).strip()
        raise DeadlineError(f"{stage}: the {self.name} was not ready after {seconds:g} s")

    def epitaph(self) -> str:
        """How the child ended, in its own last words: one line when it refused its input, else the end of its log."""
        status = self._process.wait()
        self._pumps[1].join(STOP_SECONDS)
        words = list(self._tail)[-1 if status == USAGE_STATUS else -TAIL_LINES :]
        return f"the {self.name} stopped (exit status {status}): {' / '.join(words) or 'it said nothing'}"

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def terminate(self) -> None:
        """Ask it to stop."""
        self._process.terminate()

    def kill(self) -> None:
        """Make it stop at once: it cannot refuse."""
        self._process.kill()

    def reap(self) -> None:
        """Wait until it has stopped; after STOP_SECONDS make it."""
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pump in self._pumps:
            pump.join(STOP_SECONDS)

    def _pump(self, pipe: IO[str] | None, take: Callable[[str], None], at_end: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            if pipe is None:
                return
            with pipe:
                for line in pipe:
                    take(line.rstrip("\n"))
            at_end()

        thread = threading.Thread(target=run, name=f"{self.name} output", daemon=True)
        thread.start()
        return thread

    def _announce(self, line: str) -> None:
        self._lines.put(line)

    def _finish(self) -> None:
        self._process.wait()
        self._lines.put(None)
        self._ended()

    def _keep(self, line: str) -> None:
        self._tail.append(line)
        if self._log:
            self._log.write(line + "\n")  # one write: both children's lines stay whole
            self._log.flush()
