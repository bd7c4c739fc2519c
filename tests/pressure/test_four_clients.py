"""Four clients on a budget that holds two or three: clean refusals, right answers, and nothing is left behind."""

import re
from pathlib import Path

import pytest

from client.attestation.policy import Policy
from client.session import connect
from client.turn import Pacing
from tests.faults.fleet import DEMO
from tests.faults.puppet import PATIENCE
from tests.pressure.budgets import flags_for
from tests.pressure.conftest import Answer
from tests.pressure.processes import trusted_worker
from wire.errors import ExhaustedError

CLIENTS, COUNT = 4, 8
REFUSAL = re.compile(r"the memory budget holds (\d) sessions of this model; try again later")
PROMPTS = [[5 + (37 + 8 * client) * n % 2000 for n in range(66 + 10 * client)] for client in range(CLIENTS)]
CELLS = {  # scheme, elements of the cache, sessions
    "tee-only, int8": ("tee-only", "int8", 2),
    "tee-only, float16": ("tee-only", "float16", 3),
    "secure-infer, float32": ("secure-infer", "float32", 2),
}


@pytest.mark.parametrize("cell", CELLS)
def test_four_clients_at_once(cell: str, tmp_path: Path, gpu: str, answer: Answer) -> None:
    scheme, kv, sessions = CELLS[cell]
    expected = [answer(prompt, COUNT, kv) for prompt in PROMPTS]
    with trusted_worker(tmp_path, scheme, *flags_for(DEMO, scheme, kv, sessions), gpu=gpu) as worker:
        before = worker.stats()
        together = worker.all_say(PROMPTS, COUNT)
        refused = [said for said in together if isinstance(said, ExhaustedError)]
        for said, right in zip(together, expected, strict=True):
            assert said == right or said in refused
        assert 1 <= len(refused) <= CLIENTS - sessions
        for said in refused:
            found = REFUSAL.fullmatch(str(said))
            assert found
            assert int(found[1]) == sessions
        during = worker.stats()
        assert during.pages_sealed > before.pages_sealed
        assert during.pages_restored > before.pages_restored
        worker.settled(before)
        assert worker.say(PROMPTS[-1], COUNT) == expected[-1]
        worker.settled(before)


def test_who_was_refused_gets_in_when_somebody_leaves(tmp_path: Path, answer: Answer) -> None:
    """The one that runs meanwhile is never ended for memory."""
    flags = flags_for(DEMO, "tee-only", "int8", 2)
    with trusted_worker(tmp_path, "tee-only", *flags) as trusted, connect(trusted.address, Policy()) as worker:
        before = trusted.stats()
        running, idle = (worker.open(trusted.request) for _ in range(2))
        turn = iter(running.turn(PROMPTS[0], Pacing(1, COUNT, PATIENCE)))
        said = [next(turn).token_id]
        with pytest.raises(ExhaustedError, match=REFUSAL):
            worker.open(trusted.request)
        idle.close()
        assert trusted.say(PROMPTS[1], COUNT) == answer(PROMPTS[1], COUNT, "int8")
        said += [token.token_id for token in turn]
        assert said == answer(PROMPTS[0], COUNT, "int8")
        running.close()
        trusted.settled(before)
