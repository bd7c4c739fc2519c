"""`make soak`: hours in minutes. Many sessions that come, go and break off, and nothing leaks or repeats."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from tests.conftest import build, forward, one_run
from tests.simulators.workers import CheatingWorker, Words
from wire.errors import VerificationError

SESSIONS = 3_000
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.soak
@pytest.mark.parametrize("scheme", ["secure-infer", "split", "tee-only", "kv-shield", "plain"])
def test_answers_stay_right_while_things_break(scheme: str, tmp_path: Path) -> None:
    """A minute and a half of `cleave-bench --soak`; half an hour says more about memory."""
    command = [sys.executable, "-m", "evaluation.bench", "--soak", "--schemes", scheme, "--minutes", "1.5", "--json"]
    command += ["--log", str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.stdout, done.stderr
    (soak,) = json.loads(done.stdout)["soaks"]
    assert soak["problems"] == []
    assert soak["completed"] > 0
    assert done.returncode == 0


@pytest.mark.soak
def test_sessions_come_and_go_for_a_long_time(model_folder: Callable[[str], Path]) -> None:
    """Every session's logits are those of split; memory and bank return to where they were."""
    pick = random.Random(1)
    folder = model_folder("qwen2")
    rig, plain = build(folder, "secure-infer", worker=CheatingWorker, bank_rows=48), build(folder, "split")
    worker, used = cast(CheatingWorker, rig.worker), rig.memory.used

    def lie(answer: Words, previous: Words) -> Words:
        answer[0, 0] ^= 1
        return answer

    for _ in range(SESSIONS):
        ids = [pick.randrange(300) for _ in range(pick.randrange(1, 24))]
        cache = rig.scheme.open(32)
        worker.cheat = lie if pick.random() < 0.05 else None
        try:
            logits = forward(rig.scheme, one_run(cache, ids, 0))
            assert np.array_equal(logits, plain.logits(ids, [len(ids)]))
        except VerificationError:
            rig.scheme.distrust()
        finally:
            cache.free()
        for _ in range(pick.randrange(40)):
            rig.scheme.idle()
    assert rig.memory.used == used
    assert rig.scheme.counters()["pads_reused"] == 0
    rig.fill()
    assert rig.scheme.counters()["pads_in_stock"] > 24  # a batch starts when half of one fits
