"""Thirty-two clients at once on the demo model: everybody gets what it gets alone, and nobody waits for the others."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from threading import Barrier

import pytest

from client.attestation.policy import Policy
from client.session import TrustedWorker, connect
from client.tokenizer import Tokenizer
from client.turn import Pacing
from tests.faults.cells import SHORT
from tests.faults.fleet import DEMO, TRUSTED, Fleet, Footprint, until
from wire.errors import ExhaustedError
from wire.plan import HEAD_ROWS

CLIENTS = 32
COUNT = 20
LENGTH = 44  # of the answer to SHORT, and a little less than it would be
CONTEXT = 160
BUDGET = "29MiB"  # holds a few more sessions than there are clients
SECONDS = 60.0
ROWS = HEAD_ROWS  # sessions of one step
VANISHING = range(3, CLIENTS, 5)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    patient = dict.fromkeys(("step", "connect", "request"), SECONDS) | {"session": 1.0}
    more = ("--memory-budget", BUDGET, "--pad-bank", "16MiB", "--prefill", "worker")
    with Fleet(tmp_path_factory.mktemp("many"), more=more, deadlines=patient) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of 6 to 120 tokens."""
    tokenizer, asked = Tokenizer(DEMO), (DEMO / "heldout.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in asked]
    rounds = [" ".join(questions[start : start + 1 + start % 5]) for start in range(12)]
    return [tokenizer.chat([{"role": "user", "content": text}])[:120] for text in rounds]


@dataclass(frozen=True)
class Say:
    """One client: a session of its own on a connection of its own, and when each token came."""

    fleet: Fleet
    prompt: list[int]
    count: int = COUNT
    credit: int = 4
    context: int = CONTEXT

    def __call__(self, barrier: Barrier | None = None, vanish: bool = False) -> list[tuple[int, float]]:
        """Tokens and times. One that vanishes takes three, and closes nothing."""
        with connect(self.fleet.socket, Policy(), SECONDS) as worker:
            session = worker.open(replace(self.fleet.request, max_context=self.context))
            if barrier:
                barrier.wait(SECONDS)
            turn = session.turn(self.prompt, Pacing(self.credit, self.count, SECONDS))
            said = [(token.token_id, time.monotonic()) for token in islice(turn, 3 if vanish else None)]
            if not vanish:
                session.close()
            return said


def ids(said: list[tuple[int, float]]) -> list[int]:
    return [token for token, _ in said]


def test_everybody_gets_the_answer_it_gets_alone(fleet: Fleet, prompts: list[list[int]]) -> None:
    """They join one after the other, some vanish within their answers."""
    alone = [ids(Say(fleet, prompt)()) for prompt in prompts]
    until(lambda: fleet.stats().pads_in_stock > CLIENTS)
    before, footprint = fleet.stats(), Footprint.of(fleet.pid(TRUSTED))

    def join(number: int) -> list[int]:
        time.sleep(0.02 * number)
        return ids(Say(fleet, prompts[number % len(prompts)], credit=1 + number % 8)(vanish=number in VANISHING))

    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(join, range(CLIENTS)))
    for number, said in enumerate(together):
        expected = alone[number % len(prompts)]
        assert said == (expected[:3] if number in VANISHING else expected), number
    until(lambda: not fleet.stats().sessions)
    after = fleet.stats()
    assert after.pads_reused == 0
    assert after.memory_used == before.memory_used
    assert after.products_verified > before.products_verified
    assert (after.kv_pages_used, after.spill_bytes) == (0, before.spill_bytes)
    until(lambda: Footprint.of(fleet.pid(TRUSTED)).files <= footprint.files + 4)


def test_nobody_with_credit_is_starved(fleet: Fleet) -> None:
    """While all run, a session is behind another by no more tokens than one round of the rotation."""
    barrier = Barrier(CLIENTS)
    with ThreadPoolExecutor(CLIENTS) as pool:
        runs = [pool.submit(Say(fleet, SHORT, LENGTH, credit=LENGTH), barrier) for _ in range(CLIENTS)]
        times = [[when for _, when in run.result()] for run in runs]
    end = min(one[-1] for one in times)
    counts = [sum(when <= end for when in one) for one in times]
    assert max(counts) - min(counts) <= ROWS, counts


def test_what_does_not_fit_is_refused_before_it_starts(fleet: Fleet, prompts: list[list[int]]) -> None:
    """The budget is used up by sessions that say nothing; who runs goes on, and the next one fits again in the end."""
    expected = ids(Say(fleet, prompts[0])())
    with connect(fleet.socket, Policy()) as worker:
        session = worker.open(replace(fleet.request, max_context=CONTEXT))
        turn = iter(session.turn(prompts[0], Pacing(1, COUNT, SECONDS)))
        said = [next(turn).token_id]
        held, before = fill(worker, fleet), fleet.stats()
        with pytest.raises(ExhaustedError, match="memory"):
            worker.open(replace(fleet.request, max_context=1024))
        after = fleet.stats()
        assert (after.sessions, after.memory_used) == (before.sessions, before.memory_used)
        assert after.memory_used <= after.memory_budget
        assert held >= CLIENTS
        assert said + [token.token_id for token in turn] == expected
        session.close()
    until(lambda: not fleet.stats().sessions)
    assert ids(Say(fleet, prompts[0], context=1024)()) == expected


def fill(worker: TrustedWorker, fleet: Fleet) -> int:
    """Sessions of 1024 tokens until one is refused; how many there were."""
    for number in range(2 * CLIENTS):
        try:
            worker.open(replace(fleet.request, max_context=1024))
        except ExhaustedError:
            return number
    raise AssertionError("everything fits")
