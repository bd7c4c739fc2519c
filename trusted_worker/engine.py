"""The compute thread: drain the queue, one step. When nobody waits, one tile of idle work.

Everything that touches sessions, the arena or the GPU worker runs here, one thing at a time. Other threads `submit`
a function and get a future. A step takes sessions that can go on, in the order of a rotating list, so that none waits
for ever: of those, first the single rows (decode), then prefill chunks, up to the rows that one step holds.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.model import Accept, Batch, Run
from trusted_worker.session import Session
from wire.errors import (
    CleaveError,
    ExhaustedError,
    ParkedError,
    PreconditionError,
    UnavailableError,
    VerificationError,
)
from wire.plan import HEAD_ROWS

T = TypeVar("T")
GRACE_SECONDS = 0.002  # an idle tile starts only after this long without work
RETRY_SECONDS = 1.0  # after an error in idle work
MAX_SESSIONS = 64

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a scheme."""

    def forward(self, batch: Batch, accept: Accept) -> None: ...  # noqa: D102
    def idle(self) -> bool: ...  # noqa: D102
    def distrust(self) -> None: ...  # noqa: D102


class Engine(threading.Thread):
    """Runs until `stop`. `load` makes the scheme, in this thread."""

    def __init__(self, load: Callable[[], Runner], max_rows: int) -> None:
        super().__init__(name="compute", daemon=True)
        self._load, self._max_rows = load, max_rows
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sessions: deque[Session] = deque()
        self._stopping = self._ended = False
        self._tainted = False  # a result was rejected, and what the worker may know is not renewed yet
        self.scheme: Runner | None = None
        self.loaded: Future[None] = Future()
        self.steps_rows = 0
        self.step_seconds = 0.0

    @property
    def sessions(self) -> int:
        """Sessions that are alive."""
        return len(self._sessions)

    @property
    def running(self) -> int:
        """Sessions within a turn."""
        return sum(session.in_turn for session in list(self._sessions))

    @property
    def queued(self) -> int:
        """Commands that wait for their turn."""
        return self._commands.qsize()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Have `work` run in the compute thread between two steps."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._ended:
                    raise UnavailableError("the trusted worker is stopping")
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._commands.put(command)
        if self._ended:  # nobody drains the queue any more
            self._drain()
        return future

    def limit_rows(self, rows: int) -> None:
        """At most so many rows in one step: what the scratch memory holds. While loading only."""
        self._max_rows = rows

    def stop(self) -> None:
        """End the thread after the current step; sessions are told."""
        self._stopping = True
        self._commands.put(lambda: None)

    def add(self, session: Session) -> None:
        """A new session takes part. Compute thread only. Raises ExhaustedError."""
        if len(self._sessions) >= MAX_SESSIONS:
            session.close()
            raise ExhaustedError(f"all {MAX_SESSIONS} sessions are taken; try again later")
        self._sessions.append(session)

    def remove(self, session: Session) -> None:
        """A session leaves. Compute thread only."""
        session.close()
        self._reap()

    def run(self) -> None:
        """The loop."""
        self.loaded.set_running_or_notify_cancel()
        try:
            self.scheme = self._load()
            self.loaded.set_result(None)
        except BaseException as error:
            self._end()
            self.loaded.set_exception(error)
            return
        while not self._stopping:
            self._drain()
            if self._tainted:
                self._renew(self.scheme)
            if not self._step(self.scheme):
                self._idle(self.scheme)
        self._end()

    def _end(self) -> None:
        """Tell the sessions, and everybody who still waits for a command."""
        for session in self._sessions:
            session.fail(UnavailableError("the trusted worker is stopping"))
        self._ended = True
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _idle(self, scheme: Runner) -> None:
        """Wait a moment for work; then do idle work, a tile at a time, or wait for good."""
        try:
            self._commands.get(timeout=GRACE_SECONDS)()
            return
        except queue.Empty:
            pass
        while self._commands.empty():
            did = self._guard(scheme.idle, [])
            if not did:  # nothing to do; or an error, and then another try after a while
                with contextlib.suppress(queue.Empty):
                    self._commands.get(timeout=None if did is False else RETRY_SECONDS)()
                return

    def _step(self, scheme: Runner) -> bool:
        """One forward pass over whoever can go on. False when nobody can."""
        batch, members = self._batch()
        if not members:
            self._reap()  # those that could not wake
            return False
        sessions = [session for session, _ in members]
        started = time.monotonic()
        wanting = [session for session, wants in members if wants]

        def accept(index: int, logits: F32) -> None:
            self._guard(lambda: wanting[index].accept(logits), [wanting[index]])

        self._guard(lambda: self._forward(scheme, batch, accept), sessions)
        self.step_seconds += time.monotonic() - started
        self.steps_rows += len(batch.ids)
        self._reap()
        return True

    def _forward(self, scheme: Runner, batch: Batch, accept: Accept) -> None:
        if self._tainted:
            raise UnavailableError("the GPU worker is in quarantine")
        scheme.forward(batch, accept)

    def _batch(self) -> tuple[Batch, list[tuple[Session, bool]]]:
        """Rows for one step: single rows first, so that they get pads first."""
        self._sessions.rotate(-1)
        ready = [session for session in self._sessions if session.rows][: min(self._max_rows, HEAD_ROWS)]
        ids: list[int] = []
        embeddings: list[bytes] = []
        runs, logit_rows, members = [], [], []
        for session in sorted(ready, key=lambda one: one.rows > 1):
            room = min(session.rows, self._max_rows - len(ids))
            count = self._guard(partial(session.cache.wake, room), [session]) if room else 0
            if not count:  # the step is full, or the session could not wake
                continue
            taken, rows, wants = session.take(count)
            runs.append(Run(session.cache, len(ids), len(ids) + count, session.cache.length, session.adapter))
            ids.extend(taken)
            embeddings.extend(rows)
            if wants:
                logit_rows.append(len(ids) - 1)
            members.append((session, wants))
        batch = Batch(np.array(ids, np.int32), tuple(runs), np.array(logit_rows, np.int32), tuple(embeddings))
        return batch, members

    def _guard(self, work: Callable[[], Any], sessions: list[Session]) -> Any:
        """Run a step's part. Its errors end `sessions`, and nothing else; None then."""
        try:
            return work()
        except CleaveError as error:
            log.warning("step failed: %s", type(error).__name__)
            failure = error
        except Exception as error:
            log.error("internal error in a step: %s", type(error).__name__)
            failure = PreconditionError("internal error; the session is closed")
        for session in _blamed(sessions):
            session.fail(failure)
        self._tainted |= isinstance(failure, VerificationError) and not isinstance(failure, ParkedError)
        return None

    def _renew(self, scheme: Runner) -> None:
        """After a rejected result, before any other step. Until it succeeds no step is made."""
        try:
            scheme.distrust()
            self._tainted = False
        except Exception as error:
            log.error("what the worker may know could not be renewed: %s", type(error).__name__)

    def _reap(self) -> None:
        self._sessions = deque(session for session in self._sessions if not session.dead)


def _blamed(sessions: list[Session]) -> list[Session]:
    """Whom a failed step ends: those whose own pages or adapter were the cause, and the others try again; else all."""
    failed = [session for session in sessions if session.cache.failed]
    for session in sessions if failed else []:
        if not session.cache.failed:
            session.put_back()
    return failed or sessions
