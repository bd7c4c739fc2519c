"""The one connection to the trusted worker, verified before anything is sent over it, and again after every loss.

What is seen: nothing of a prompt; here only evidence is asked for. What it grants: `worker` hands out the connection
while its evidence is accepted, and raises otherwise, so that no prompt even gets into a thread that could send it. What
breaks it: nothing here, if the policy is right; frames are sealed for the key that the evidence binds, whoever has the
connection (client/session.py).

 1. Read the policy file, as it is now.
 2. Ask for evidence over a fresh nonce, and judge it. The first connection is made here; later ones gRPC makes.
 3. Accepted: ready, until the connection or a call over it is lost, or the evidence is EVIDENCE_SECONDS old: then 1.
    After a loss calls wait for the verdict. While old evidence is renewed they go on.
 4. Refused, or nobody there: not ready. Every call fails with the step that failed; 1 again after RETRY_SECONDS.
"""

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.attestation.checklist import Refusal, Step
from client.attestation.policy import Policy
from client.attestation.policy_file import load
from client.attestation.toml_table import PolicyError
from client.report import attestation
from client.session import TrustedWorker, connect
from client.terminal import one_line
from wire.errors import CleaveError, DeadlineError, UnauthenticatedError, UnavailableError

CONNECT_SECONDS = 30.0  # hardware takes its time for evidence
EVIDENCE_SECONDS = 3600.0  # evidence that is older is asked for anew
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Failure:
    """Why the worker is not verified. `field` names the step; `steps` are all that were taken, where there was one."""

    field: str
    text: str
    number: int | None = None
    advice: str | None = None
    provider: str | None = None
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """From what the attempt raised."""
        if isinstance(error, Refusal):
            step = error.step
            return cls(step.field, str(error), step.number, error.advice, error.provider, error.steps)
        if isinstance(error, UnavailableError | DeadlineError):
            return cls("connect", one_line(str(error)))
        if isinstance(error, CleaveError):
            return cls("policy" if isinstance(error, PolicyError) else "evidence", one_line(str(error)))
        return cls("evidence", f"internal error: {type(error).__name__}")


class NotVerifiedError(UnauthenticatedError):
    """Nothing is sent: the trusted worker is not verified."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"the trusted worker is not verified, and nothing was sent to it: {failure.text}")
        self.failure = failure


class Link:
    """Run `keep` in the event loop; everything else belongs to that loop too, but for `lost`."""

    def __init__(self, target: str, policy: Path, notify: Callable[[str], None]) -> None:
        """Raises PolicyError for a file that is not accepted. `notify` gets a line when the state changes."""
        load(policy)
        self.target = target
        self.failure: Failure | None = None
        self.attempts = self.failures = 0
        self.policy_digest = ""  # SHA-256 of the file in force, hexadecimal
        self.trusted: TrustedWorker | None = None
        self._policy, self._notify = policy, notify
        self._connection = contextlib.ExitStack()
        self._settled, self._loss = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @property
    def ready(self) -> bool:
        """Whether the worker is verified."""
        return self._settled.is_set() and self.failure is None

    async def worker(self) -> TrustedWorker:
        """The verified connection; waits while a verdict is due. Raises NotVerifiedError."""
        await self._settled.wait()
        if self.failure or self.trusted is None:
            raise NotVerifiedError(self.failure or Failure("evidence", "there was no attempt"))
        return self.trusted

    def lost(self) -> None:
        """From any thread: what answers next may be another machine."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._note_loss)

    async def keep(self) -> None:
        """Verify, again and again, until cancelled."""
        with self._connection:
            while True:
                self._loss.clear()
                await self._verify()
                if self.failure:
                    await asyncio.sleep(RETRY_SECONDS)  # (4)
                    continue
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._loss.wait(), EVIDENCE_SECONDS)  # (3)

    def _note_loss(self) -> None:
        self._loss.set()
        if self.failure is None:
            self._settled.clear()

    async def _verify(self) -> None:
        before, failure = self.failure, None
        self.attempts += 1
        try:
            await _apart(self._attest)
        except Exception as error:
            failure = Failure.of(error)
            self.failures += 1
        self.failure = failure
        if failure or not self._loss.is_set():
            self._settled.set()
        if failure and (before is None or before.text != failure.text):
            self._notify(one_line(f"not verified, step {failure.field}: {failure.text}"))
        elif failure is None and (before or self.attempts == 1) and self.trusted:
            self._notify(attestation(self.trusted.peer))

    def _attest(self) -> None:
        policy = Policy(rules=load(self._policy))  # (1)
        digest = hashlib.sha256(self._policy.read_bytes()).hexdigest()
        if self.trusted is None:
            self.trusted = self._connection.enter_context(connect(self.target, policy, CONNECT_SECONDS))  # (2)
            self.trusted.on_loss(self.lost)
        else:
            self.trusted.renew(policy)
        self.policy_digest = digest

    def age(self) -> float | None:
        """Of the evidence that was accepted last, in seconds; None when there is none."""
        return (datetime.now(UTC) - self.trusted.peer.at).total_seconds() if self.trusted else None


async def _apart(work: Callable[[], None]) -> None:
    """Wait for `work` in a thread that the end of the program does not wait for: a silent worker holds it for long."""
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()  # whoever stops waiting does not cancel it

    def run() -> None:
        try:
            work()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="verify", daemon=True).start()
    await asyncio.wrap_future(done)
