"""An ordinary folder served as configfs-tsm is, by a thread that can also misbehave."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

POLL_SECONDS = 0.002


def evidence(data: bytes) -> bytes:
    """What is served unless a test says otherwise."""
    return b"evidence over " + data


class FakeTsm:
    """Serves while it is entered. Somebody else writes to the first `foreign` requests; `stuck`: no reports."""

    def __init__(
        self,
        folder: Path,
        provider: str = "simulated",
        answer: Callable[[bytes], bytes] = evidence,
        aux: bytes = b"",
        foreign: int = 0,
        stuck: bool = False,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.provider, self._answer, self.aux = folder, provider, answer, aux
        self.foreign, self.stuck = foreign, stuck
        self.requests, self.at_once = list[bytes](), 0
        self.answered = set[Path]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "FakeTsm":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def left(self) -> list[Path]:
        """What nobody removed."""
        return list(self.folder.iterdir())

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            made = self.left
            self.at_once = max(self.at_once, len(made))
            for one in made:
                with suppress(OSError):  # it may be removed at any time
                    self._serve(one)

    def _serve(self, made: Path) -> None:
        if not (made / "inblob").exists():
            (made / "provider").write_text(self.provider + "\n")
            (made / "generation").write_text("0\n")
            (made / "inblob").touch()
        data = (made / "inblob").read_bytes()
        if len(data) != 64 or made in self.answered:
            return
        self.answered.add(made)
        self.requests.append(data)
        _put(made / "generation", b"2\n" if self.foreign else b"1\n")
        self.foreign = max(0, self.foreign - 1)
        if self.aux:
            _put(made / "auxblob", self.aux)
        if not self.stuck:
            _put(made / "outblob", self._answer(data))


def _put(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.rename(path)
