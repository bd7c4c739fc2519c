"""What a user of `cleave chat` reads when a worker fails within an answer: one clear line, in time."""

import signal
import subprocess
import sys
import time

import pytest

from tests.faults.cells import LONG
from tests.faults.fleet import DEADLINES, DEMO, GPU, TRUSTED, Fleet, until
from tests.faults.puppet import PATIENCE, ROOT

GONE = "the peer is gone or cannot be reached"
LOST = "the GPU worker is not available (UNAVAILABLE)"
SILENT = "the trusted worker sent nothing for 1 s: it may be overloaded; --timeout waits longer"
REPORTS = [
    pytest.param(TRUSTED, signal.SIGKILL, GONE, id="trusted worker killed"),
    pytest.param(TRUSTED, signal.SIGSTOP, SILENT, id="trusted worker stopped", marks=pytest.mark.soak),
    pytest.param(GPU, signal.SIGKILL, LOST, id="GPU worker killed", marks=pytest.mark.soak),
]
CLOSING = 3.0  # that a client gives a silent worker to hear its Close


@pytest.mark.parametrize(("role", "number", "report"), REPORTS)
def test_one_clear_line(fleet: Fleet, role: str, number: signal.Signals, report: str) -> None:
    until(lambda: fleet.stats().pads_in_stock > 16)
    fleet.ask(LONG, 1)  # both links carry
    until(lambda: fleet.stats().pads_in_stock > 16)
    fleet.back.hold()
    words = [
        "chat",
        "--connect",
        fleet.front.target,
        "--model",
        str(DEMO),
        "--timeout",
        "1" if role == TRUSTED else "8",
    ]
    words += ["--token-ids", ",".join(map(str, LONG))]
    chat = subprocess.Popen([sys.executable, "-m", "client", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: fleet.back.held > 1 << 12)
        fleet.signal(role, number)
        fleet.back.release()
        began = time.monotonic()
        _, said = chat.communicate(timeout=PATIENCE)
    finally:
        chat.kill()
        chat.wait()
    assert time.monotonic() - began < DEADLINES["step"] + CLOSING + 5
    assert (chat.returncode, said) == (1, f"cleave chat: {report}\n")
