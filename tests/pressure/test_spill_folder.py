"""The folder for parked pages is full or gone: a clear error for whom it concerns, right answers for all others."""

import os
import resource
import threading
from collections.abc import Callable
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
from tests.pressure.processes import trusted_worker
from wire.errors import ExhaustedError

SHORT = [5 + 37 * n % 2000 for n in range(60)]
LONG = [7 + 41 * n % 2000 for n in range(150)]
FULL = "the folder for parked pages is full or cannot be written"
FLAGS = flags_for(DEMO, "tee-only", "int8", 2)  # LONG has two full pages
PAGE = 17408 + 16  # bytes of one, sealed


def test_a_folder_that_takes_no_byte_ends_who_needs_it(tmp_path: Path, answer: Answer) -> None:
    """No file of the process may grow from here on: the kernel refuses as a full disk does."""
    with trusted_worker(tmp_path, "tee-only", *FLAGS) as trusted, connect(trusted.address, Policy()) as worker:
        before = trusted.stats()
        running = worker.open(trusted.request)
        turn = iter(running.turn(SHORT, Pacing(1, 4, PATIENCE)))
        said = [next(turn).token_id]
        resource.prlimit(trusted.child.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        for _ in range(2):
            with pytest.raises(ExhaustedError, match=FULL):
                trusted.say(LONG, 4)
        assert trusted.serving()
        said += [token.token_id for token in turn]
        assert said == answer(SHORT, 4, "int8")
        running.close()
        trusted.settled(before)
        resource.prlimit(trusted.child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert trusted.say(LONG, 4) == answer(LONG, 4, "int8")
        trusted.settled(before)


def test_a_folder_that_is_gone_ends_who_needs_it(tmp_path: Path, answer: Answer) -> None:
    """Removed between the start and the first page; made again, it serves again, without a restart."""
    spill = tmp_path / "spill"
    spill.mkdir()
    with trusted_worker(tmp_path, "tee-only", *FLAGS, "--spill-dir", str(spill)) as trusted:
        before = trusted.stats()
        spill.rmdir()
        with pytest.raises(ExhaustedError, match=FULL):
            trusted.say(LONG, 4)
        assert trusted.serving()
        assert trusted.say(SHORT, 4) == answer(SHORT, 4, "int8")
        trusted.settled(before)
        spill.mkdir()
        assert trusted.say(LONG, 4) == answer(LONG, 4, "int8")
        trusted.settled(before)


class Disk:
    """os.pwritev that writes nothing, or half, once `room` bytes are used up."""

    def __init__(self, room: int, write: Callable[..., int]) -> None:
        self.room, self._write = room, write
        self._lock = threading.Lock()

    def pwritev(self, descriptor: int, buffers: Any, offset: int) -> int:
        """Part of what is there, as a kernel may on the last blocks of a disk."""
        data = b"".join(bytes(one) for one in buffers)
        with self._lock:
            taken = min(self.room, len(data))
            self.room -= taken
        if not taken:
            raise OSError(28, "No space left on device")
        return self._write(descriptor, [data[:taken]], offset)


@pytest.mark.parametrize(("scheme", "pages"), [("tee-only", 2.5), ("secure-infer", 7), ("split", 0)])
def test_a_disk_that_fills_up_midway(
    scheme: str, pages: float, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in company, on a disk with room for some pages: whoever answers is right, and memory comes back."""
    with inside(DEMO, scheme, *flags_for(DEMO, scheme, "int8", 2)) as worker:
        worker.say(SHORT[:3], 1)
        before = worker.stats()
        disk = Disk(round(pages * PAGE), os.pwritev)
        monkeypatch.setattr("os.pwritev", disk.pwritev)
        clients = {tuple(ids): worker.open() for ids in (SHORT, LONG)}
        for ids, client in clients.items():
            client.begin(list(ids), 6)
        ended = []
        for ids, client in clients.items():
            try:
                assert client.hear(6) == answer(list(ids), 6, "int8")
            except ExhaustedError as error:
                ended.append(str(error))
            client.close()
        assert set(ended) == {FULL}
        monkeypatch.undo()
        after = worker.stats()
        assert (after.memory_used, after.kv_pages_used) == (before.memory_used, 0)
        assert worker.say(LONG, 6) == answer(LONG, 6, "int8")
