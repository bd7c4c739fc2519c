"""A simulated TEE: a process that serves a folder as the kernel serves configfs-tsm. It protects from nobody.

    python -m deploy.local.simulated_tee --folder DIR

DIR must be private. What is seen: whoever may write there gets evidence over whatever they like. What is learnt from
such evidence is in simulated_pki.py: nothing about hardware, and the measurement is what this software says of the
trusted worker's source. What breaks it: everybody with this user's rights; none of this is a boundary.

A request is a directory in DIR, made and removed by the trusted worker:

    1  the directory appears; generation ("0"), an empty inblob and, last, provider ("simulated") are put into it
    2  the trusted worker writes 64 bytes of report data to inblob
    3  generation becomes "1"; auxblob, the certificate table; outblob, the report, last

Files appear whole, by renaming. Everything else in DIR is left alone: files, links, names that are not plain. The keys
are made meanwhile: a line says "listening" before, and one says "ready", the root's fingerprint and the measurement.
"""

import argparse
import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from deploy.local.simulated_pki import REPORT_DATA_BYTES, DevPki
from wire.errors import CleaveError, InvalidArgumentError
from wire.lifetime import die_with_parent

MAX_REQUESTS = 64  # directories at one time; others wait until some are gone
POLL_SECONDS = 0.015
_ROOT = Path(__file__).resolve().parents[2]
_MEASURED = ("trusted_worker", "wire")  # packages
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_SCRATCH = ".new"  # a file before it is renamed

Request = tuple[str, int]  # name and inode of a directory
Answer = Callable[[bytes], tuple[bytes, bytes] | None]  # report data in; certificate table and report out, or not yet


class TsmFolder:
    """The folder. `serve_once` looks at it one time and blocks for nothing that lies in it."""

    def __init__(self, folder: Path, answer: Answer) -> None:
        try:
            self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise InvalidArgumentError(f"--folder {folder} is no directory that can be read") from error
        if os.fstat(self._root).st_mode & 0o077:
            raise InvalidArgumentError(f"--folder {folder} must be private to one user: chmod 700")
        self._answer = answer
        self._finished: dict[Request, bool] = {}  # by request that is there

    def serve_once(self) -> None:
        """Take every request one step further. What cannot be served is left alone from then on."""
        present = set(self._requests())
        self._finished = {request: done for request, done in self._finished.items() if request in present}
        for request in sorted(present):
            if request not in self._finished and len(self._finished) >= MAX_REQUESTS:
                continue
            try:
                if not self._finished.get(request):
                    self._finished[request] = self._advance(request)
            except OSError:
                self._finished[request] = True

    def _requests(self) -> Iterator[Request]:
        with os.scandir(self._root) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield entry.name, entry.inode()

    def _advance(self, request: Request) -> bool:
        """Whether there is nothing more to do for it. Raises OSError."""
        with _directory(self._root, request[0]) as folder:
            if request not in self._finished:  # step 1
                self._put(folder, "generation", b"0\n")
                self._put(folder, "inblob", b"")
                self._put(folder, "provider", b"simulated\n")  # who only wants to know this may leave right after
                return False
            report_data = _inblob(folder)  # step 2
            if report_data is None:
                return False
            if (answer := self._answer(report_data)) is None:
                return False
            table, report = answer
            self._put(folder, "generation", b"1\n")  # step 3
            self._put(folder, "auxblob", table)
            self._put(folder, "outblob", report)
            return True

    def _put(self, folder: int, name: str, content: bytes) -> None:
        """Make a whole file appear. Raises OSError, when the directory is gone or something odd is in the way."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_SCRATCH, dir_fd=self._root)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(_SCRATCH, flags, 0o600, dir_fd=self._root), "wb") as file:
            file.write(content)
        os.rename(_SCRATCH, name, src_dir_fd=self._root, dst_dir_fd=folder)


@contextlib.contextmanager
def _directory(root: int, name: str) -> Iterator[int]:
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _inblob(folder: int) -> bytes | None:
    """The report data, None while it is not whole. Raises OSError for what is longer, or no file."""
    descriptor = os.open("inblob", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("inblob is no file")
        data = file.read(REPORT_DATA_BYTES + 1)
    if len(data) > REPORT_DATA_BYTES:
        raise OSError("inblob is too long")
    return data if len(data) == REPORT_DATA_BYTES else None


def measure(root: Path) -> bytes:
    """SHA-384 over the source files of the trusted worker, 48 bytes: names and contents, each with its length."""
    digest = hashlib.sha384()
    for path in sorted(path for package in _MEASURED for path in (root / package).rglob("*.py")):
        for part in (path.relative_to(root).as_posix().encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def main(argv: list[str] | None = None) -> None:
    """Serve until the process is ended. Leaves with status 2 and one line when the folder will not do."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Evidence that proves nothing, in a real format.")
    parser.add_argument("--folder", type=Path, required=True, help="a private directory: the fake configfs")
    parser.add_argument("--parent", type=int, default=None, help="end when this process ends")
    options = parser.parse_args(argv)
    try:
        if options.parent is not None:
            die_with_parent(options.parent)
        measurement, keys = measure(_ROOT), ThreadPoolExecutor(1).submit(DevPki)
        folder = TsmFolder(options.folder, lambda data: _sign(keys, data, measurement))
    except CleaveError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print("listening", flush=True)
    while not keys.done():
        folder.serve_once()
        time.sleep(POLL_SECONDS)
    print(f"ready {keys.result().root} {measurement.hex()}", flush=True)
    while True:
        folder.serve_once()
        time.sleep(POLL_SECONDS)


def _sign(keys: Future[DevPki], report_data: bytes, measurement: bytes) -> tuple[bytes, bytes] | None:
    return (keys.result().table, keys.result().report(report_data, measurement)) if keys.done() else None


if __name__ == "__main__":
    main()
