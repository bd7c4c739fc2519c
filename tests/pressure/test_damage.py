"""What is parked is changed, cut off or unreadable: DATA_LOSS for whom it concerns, and the worker goes on."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from client.attestation.policy import Policy
from client.session import connect
from client.turn import Pacing
from tests.faults.fleet import DEMO
from tests.faults.puppet import PATIENCE
from tests.pressure.budgets import flags_for
from tests.pressure.conftest import Answer
from tests.pressure.inside import inside
from tests.pressure.processes import Trusted, trusted_worker
from wire.errors import VerificationError

SHORT = [5 + 37 * n % 2000 for n in range(10)]
LONG = [[7 + step * n % 2000 for n in range(134)] for step in (41, 43)]
COUNT = 4


def parked_files(trusted: Trusted, folder: Path) -> set[Path]:
    """By which a process's open files of a folder can be opened, though they have no names there."""
    found = set()
    try:
        for link in Path(f"/proc/{trusted.child.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found |= {link} if os.readlink(link).startswith(f"{folder}/") else set()
    except PermissionError:
        pytest.skip("the worker is not dumpable: only root sees its files")
    return found


def flip(data: bytes) -> bytes:
    """One bit, in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "changed": flip,
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


def test_parked_weights(tmp_path: Path, answer: Answer) -> None:
    """Every session gets the same error as long as the damage lasts, and the right answer when it is undone."""
    spill = tmp_path / "spill"
    spill.mkdir()
    flags = [*flags_for(DEMO, "tee-only", "int8", 2), "--spill-dir", str(spill)]
    with trusted_worker(tmp_path, "tee-only", *flags) as trusted:
        before = trusted.stats()
        assert not before.weights_resident
        assert trusted.say(SHORT, COUNT) == answer(SHORT, COUNT, "int8")
        (tiles,) = parked_files(trusted, spill)
        whole = tiles.read_bytes()
        for kind, damage in DAMAGE.items():
            tiles.write_bytes(damage(whole))
            for _ in range(2):
                with pytest.raises(VerificationError):
                    trusted.say(SHORT, COUNT)
            assert trusted.serving(), kind
            trusted.settled(before)
            tiles.write_bytes(whole)
            assert trusted.say(SHORT, COUNT) == answer(SHORT, COUNT, "int8"), kind
        trusted.settled(before)


def test_a_page_of_one_conversation(tmp_path: Path, answer: Answer) -> None:
    """Of two in one step, both with parked pages: one ends, the other one does not notice."""
    spill = tmp_path / "spill"
    spill.mkdir()
    flags = [*flags_for(DEMO, "tee-only", "int8", 2), "--spill-dir", str(spill)]
    with trusted_worker(tmp_path, "tee-only", *flags) as trusted, connect(trusted.address, Policy()) as worker:
        before, known = trusted.stats(), parked_files(trusted, spill)
        sessions = [worker.open(trusted.request) for _ in LONG]
        turns, said = [], []
        for session, prompt in zip(sessions, LONG, strict=True):
            turns.append(iter(session.turn(prompt, Pacing(1, COUNT, PATIENCE))))
            said.append([next(turns[-1]).token_id])
            if len(turns) == 1:
                (pages,) = parked_files(trusted, spill) - known
        pages.write_bytes(bytes(byte ^ 1 for byte in pages.read_bytes()))
        with pytest.raises(VerificationError):
            list(turns[0])
        said[1] += [token.token_id for token in turns[1]]
        assert said[1] == answer(LONG[1], COUNT, "int8")
        for session in sessions:
            session.close()
        trusted.settled(before)
        assert trusted.serving()
        assert trusted.say(LONG[0], COUNT) == answer(LONG[0], COUNT, "int8")


@pytest.mark.parametrize("scheme", ["tee-only", "secure-infer"])
def test_of_two_in_one_step_one_ends(scheme: str, answer: Answer) -> None:
    """The step fails for both, and is made again without the one whose page was changed."""
    with inside(DEMO, scheme, *flags_for(DEMO, scheme, "int8", 2), "--prefill", "worker") as worker:
        before, clients = worker.stats(), [worker.open() for _ in LONG]
        for client, prompt in zip(clients, LONG, strict=True):
            assert client.say(prompt, 1) == answer(prompt, 1, "int8")
        clients[0].damage()

        def both() -> None:
            for client in clients:
                client.feed([], COUNT - 1)

        worker.do(both)  # so the next step has both
        with pytest.raises(VerificationError):
            clients[0].hear(1)
        assert clients[1].hear(COUNT - 1) == answer(LONG[1], COUNT, "int8")[1:]
        for client in clients:
            client.close()
        after = worker.stats()
        assert (after.memory_used, after.kv_pages_used, after.sessions) == (before.memory_used, 0, 0)
        assert after.spill_bytes == before.spill_bytes


def unreadable(*_: Any) -> int:
    """Like a disk that fails."""
    raise OSError(5, "Input/output error")


READS = [("tee-only", "preadv"), ("secure-infer", "preadv"), ("secure-infer", "pread")]


@pytest.mark.parametrize(("scheme", "call"), READS)
def test_a_disk_that_cannot_be_read(scheme: str, call: str, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and pages come by preadv, pads by pread. Who is idle meanwhile goes on afterwards."""
    with inside(DEMO, scheme, *flags_for(DEMO, scheme, "int8", 2), "--prefill", "worker") as worker:
        before, waiting = worker.stats(), worker.open()
        expected = answer(SHORT, 2 * COUNT, "int8")
        assert waiting.say(SHORT, COUNT) == expected[:COUNT]
        worker.await_pads()
        monkeypatch.setattr(f"os.{call}", unreadable)
        for _ in range(2):
            with pytest.raises(VerificationError):
                worker.say(LONG[0], COUNT)  # more tokens than pads
        monkeypatch.undo()
        waiting.grant(COUNT)
        assert waiting.hear(COUNT) == expected[COUNT:]
        waiting.close()
        after = worker.stats()
        assert (after.memory_used, after.kv_pages_used, after.sessions) == (before.memory_used, 0, 0)
        assert worker.say(SHORT, COUNT) == expected[:COUNT]
