"""Clients that say nothing, talk nonsense, flood or vanish: a bounded cost, and who is served keeps being served."""

import os
import signal
from contextlib import suppress

import pytest

from client.attestation.policy import Policy
from client.session import connect
from client.turn import Pacing
from tests.faults.cells import COUNT, SHORT
from tests.faults.fleet import CLIENT_SECONDS, GPU, TRUSTED, Fleet, Footprint, until
from tests.faults.strangers import ATTACKS
from wire.errors import CleaveError

RSS_BOUND = 32 << 20  # bytes that one kind of attack may add to the trusted worker
ROUNDS = 9
PINGS_SECONDS = 150.0  # a connection is given up whose other end does not answer pings: seen after 60


@pytest.mark.parametrize("attack", ATTACKS)
def test_who_is_served_keeps_being_served(fleet: Fleet, attack: str, expected: list[int]) -> None:
    until(lambda: not fleet.stats().sessions)
    before, footprints = fleet.stats(), {role: Footprint.of(fleet.pid(role)) for role in (GPU, TRUSTED)}
    with connect(fleet.socket, Policy()) as worker:
        session = worker.open(fleet.request)
        turn = iter(session.turn(SHORT, Pacing(1, COUNT, CLIENT_SECONDS)))
        said = [next(turn).token_id]
        with ATTACKS[attack](fleet):
            said += [next(turn).token_id for _ in range(COUNT // 2)]
            assert fleet.stats().rss < before.rss + RSS_BOUND
        assert said + [token.token_id for token in turn] == expected
        session.close()
    until(lambda: not fleet.stats().sessions)
    assert fleet.stats().memory_used == before.memory_used
    assert fleet.stats().rss < before.rss + RSS_BOUND
    assert fleet.ask(SHORT, COUNT) == expected
    for role, footprint in footprints.items():
        more = Footprint(footprint.files + 4, footprint.threads + 8)  # pools of the library, not one for each attacker
        until(lambda role=role, more=more: Footprint.of(fleet.pid(role)).within(more))  # type: ignore[misc]


@pytest.mark.soak
def test_faults_that_repeat_leave_nothing_behind(fleet: Fleet, expected: list[int]) -> None:
    """The links are cut within answers again and again: no file and no thread is left over from any of them."""
    seen: dict[str, list[Footprint]] = {GPU: [], TRUSTED: []}
    for number in range(ROUNDS):
        puppet = fleet.puppet()
        assert puppet.do("say", ids=SHORT, count=COUNT, credit=1, timeout=CLIENT_SECONDS) == {}
        assert puppet.do("next")["token"] == expected[0]
        (fleet.back if number % 2 else fleet.front).cut()
        fleet.dismiss()
        fleet.heal()
        until(lambda: not fleet.stats().sessions)
        with suppress(CleaveError):
            fleet.ask(SHORT, 1)  # finds out that the connection is gone
        assert fleet.ask(SHORT, COUNT) == expected
        for role, prints in seen.items():
            prints.append(Footprint.of(fleet.pid(role)))
    for prints in seen.values():
        most = Footprint(
            max(one.files for one in prints[: ROUNDS // 3]), max(one.threads for one in prints[: ROUNDS // 3])
        )
        assert min(one.files for one in prints[-ROUNDS // 3 :]) <= most.files, prints
        assert min(one.threads for one in prints[-ROUNDS // 3 :]) <= most.threads, prints
    assert fleet.stats().pads_reused == 0


@pytest.mark.soak
def test_a_client_stopped_for_good_is_given_up(fleet: Fleet) -> None:
    """Its kernel still holds the connection: pings without an answer end it, and then the session goes."""
    puppets = [fleet.puppet() for _ in range(2)]
    for puppet, count in zip(puppets, (1, COUNT), strict=True):  # one idle, one within an answer
        puppet.do("say", ids=SHORT, count=count, credit=1, timeout=CLIENT_SECONDS)
        assert "tokens" in puppet.do("rest") if count == 1 else "token" in puppet.do("next")
    for puppet in puppets:
        os.kill(puppet.process.pid, signal.SIGSTOP)
    until(lambda: not fleet.stats().sessions, PINGS_SECONDS)
    for puppet in puppets:
        os.kill(puppet.process.pid, signal.SIGCONT)
        puppet.tell("say", ids=SHORT, count=COUNT, credit=1, timeout=CLIENT_SECONDS)
    fleet.dismiss()
