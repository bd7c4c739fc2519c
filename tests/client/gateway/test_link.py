"""The states of the connection, with attempts that a test decides."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from queue import Queue
from threading import Event
from typing import Any

import pytest

from client.attestation.checklist import Step, refuse
from client.attestation.checklist import Wrong as WrongStep
from client.gateway import link as module
from client.gateway.link import Link, NotVerifiedError
from deploy.local import simulated_policy
from tests.faults.fleet import until
from wire.errors import PreconditionError, UnavailableError

REFUSAL = refuse("simulated", 7, "measurement", WrongStep("another one", "ask"), [Step(1, "size", "passed", "7")])


class Scripted(Link):
    """A link whose attempts end as it is told, and not before."""

    def __init__(self, policy: Path) -> None:
        self.verdicts: Queue[Exception | None] = Queue()
        self.lines: list[str] = []
        super().__init__("127.0.0.1:1", policy, self.lines.append)

    def _attest(self) -> None:
        verdict = self.verdicts.get(timeout=20)
        if verdict:
            raise verdict
        self.trusted = self.trusted or Peer()  # type: ignore[assignment]


class Peer:
    """What is left of a connection."""

    class peer:  # noqa: N801
        provider, verified = "tdx", True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)


def written(folder: Path) -> Path:
    """A policy that nobody meets."""
    policy = folder / "policy.toml"
    policy.write_text(simulated_policy.text("ab" * 32, "ab" * 48, "secure-infer", []))
    return policy


def play(tmp_path: Path, scene: Callable[[Scripted], Awaitable[None]]) -> None:
    """Run a scene beside a link that keeps itself."""

    async def run() -> None:
        link = Scripted(written(tmp_path))
        keeper = asyncio.create_task(link.keep())
        try:
            await asyncio.wait_for(scene(link), 30)
        finally:
            keeper.cancel()
            link.verdicts.put(None)  # the attempt that is under way ends

    asyncio.run(run())


async def come(condition: Callable[[], Any]) -> None:
    await asyncio.to_thread(until, condition)


def test_calls_wait_for_the_first_verdict(tmp_path: Path) -> None:
    async def scene(link: Scripted) -> None:
        call = asyncio.create_task(link.worker())
        await asyncio.sleep(0.05)
        assert (call.done(), link.ready) == (False, False)
        link.verdicts.put(None)
        assert await call is link.trusted
        await come(lambda: link.ready)
        assert link.lines == ["verified: tdx"]

    play(tmp_path, scene)


def test_the_end_does_not_wait_for_an_attempt_that_hangs(tmp_path: Path) -> None:
    over = Event()

    class Silent(Scripted):
        ended: bool | None = None

        def _attest(self) -> None:
            self.ended = over.wait(10)

    links: list[Silent] = []

    async def run() -> None:
        links.append(Silent(written(tmp_path)))
        keeper = asyncio.create_task(links[0].keep())
        await come(lambda: links[0].attempts == 1)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    asyncio.run(run())
    assert links[0].ended is None
    over.set()


def test_a_refusal_is_what_every_call_gets_until_one_is_accepted(tmp_path: Path) -> None:
    async def scene(link: Scripted) -> None:
        for verdict in (REFUSAL, REFUSAL, UnavailableError("nobody"), PreconditionError("loading"), KeyError("secret")):
            link.verdicts.put(verdict)
        await come(lambda: link.failures == 5)
        with pytest.raises(NotVerifiedError, match=r"internal error: KeyError$") as caught:
            await link.worker()
        assert caught.value.failure.field == "evidence"
        assert not link.ready
        link.verdicts.put(None)
        await come(lambda: link.ready)
        steps = [line.split(": ")[0] for line in link.lines]
        said = ["measurement", "connect", "evidence", "evidence"]  # what did not change is said once
        assert steps == [*(f"not verified, step {step}" for step in said), "verified"]

    play(tmp_path, scene)


def test_after_a_loss_calls_wait_for_the_next_verdict(tmp_path: Path) -> None:
    async def scene(link: Scripted) -> None:
        link.verdicts.put(None)
        await link.worker()
        await asyncio.to_thread(link.lost)
        await come(lambda: not link.ready)
        calls = [asyncio.create_task(link.worker()) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(call.done() for call in calls)
        link.verdicts.put(REFUSAL)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, NotVerifiedError) and result.failure.number == 7 for result in results)

    play(tmp_path, scene)


def test_a_loss_during_an_attempt_asks_for_another_one(tmp_path: Path) -> None:
    async def scene(link: Scripted) -> None:
        await come(lambda: link.attempts == 1)
        link.lost()
        await asyncio.sleep(0)
        link.verdicts.put(None)
        await come(lambda: link.attempts == 2)
        assert not link.ready
        link.verdicts.put(None)
        await link.worker()

    play(tmp_path, scene)


def test_old_evidence_is_renewed_while_calls_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVIDENCE_SECONDS", 0.05)

    async def scene(link: Scripted) -> None:
        link.verdicts.put(None)
        await link.worker()
        await come(lambda: link.attempts == 2)
        assert link.ready
        await link.worker()
        link.verdicts.put(REFUSAL)
        await come(lambda: not link.ready)

    play(tmp_path, scene)
