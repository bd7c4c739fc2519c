"""Evidence from the kernel: configfs-tsm, as SEV-SNP and TDX guests have it (Linux 6.7 and later).

What the host sees: 64 bytes of report data, a hash. What it learns: when evidence is made. What breaks it: nothing
here is trusted; evidence that somebody changed is refused by the client. Who writes into the folder can make it fail.
Azure's confidential VMs have a vTPM in place of this folder, which is not supported.

Steps of one report:
 1. Make a directory of its own, under a random name. No two requests share one.
 2. Note `generation`, and write exactly 64 bytes into `inblob`; the kernel takes them when the file is closed.
 3. Read `outblob`, which asks the hardware and may take a minute, then `auxblob`, which may be empty or missing.
 4. `generation` has moved by our own write, or somebody else wrote too: discard everything and begin again.
 5. Remove the directory, whatever happened.

The folder may be an ordinary one that another process serves, a simulator: there the files appear a moment after the
directory, and `outblob` last. The code is the same: what is not there yet is waited for, and every wait is bounded.
"""

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from wire.binding import REPORT_DATA_BYTES
from wire.errors import CleaveError, DeadlineError, PreconditionError, UnavailableError

PROVIDERS = {"sev_guest": "sev-snp", "tdx_guest": "tdx", "simulated": "simulated"}
MAX_EVIDENCE_BYTES = 32 << 10
MAX_AUX_BYTES = 64 << 10
MAX_QUOTE_BYTES = 8 << 10  # a larger TDX quote is not of the ECDSA layout
ATTEMPTS, REMOVALS = 3, 20
POLL_SECONDS = 0.005
CONFIGFS, TPM = Path("/sys/kernel/config"), Path("/dev/tpmrm0")

T = TypeVar("T")


class Report(NamedTuple):
    """Evidence as it came: by whom (a value of PROVIDERS), the report or quote, the host's certificate table."""

    provider: str
    evidence: bytes
    aux: bytes


class Tsm:
    """The folder, /sys/kernel/config/tsm/report or what stands in for it. Blocks: not for the threads that serve."""

    def __init__(self, folder: Path, seconds: float = 5.0) -> None:
        """`seconds` for each file that is waited for, four times that for evidence: a simulator may be making its keys.

        The kernel has its own deadline for what it serves.
        """
        self._folder, self._seconds = folder, seconds

    def provider(self) -> str:
        """Who makes evidence here. Raises PreconditionError with what to do when nobody does; as `report`."""
        with self._directory() as made:
            return self._provider(made)

    def report(self, data: bytes) -> Report:
        """Evidence over 64 bytes. Raises PreconditionError, UnavailableError, DeadlineError: all say what to do."""
        if len(data) != REPORT_DATA_BYTES:
            raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
        for _ in range(ATTEMPTS):
            with self._directory() as made:
                report = self._report(made, data)
            if report is not None:
                return report
        raise UnavailableError("somebody else writes into this worker's requests for evidence; try again")

    def _report(self, made: Path, data: bytes) -> Report | None:
        """Steps 2 to 4; None when somebody else wrote."""
        provider, before = self._provider(made), self._generation(made)  # 2
        self._await(made / "inblob", partial(_write, data=data))
        most = MAX_EVIDENCE_BYTES
        evidence = self._await(made / "outblob", partial(_read, most=most), 4 * self._seconds)  # 3
        aux = b""
        with suppress(FileNotFoundError):
            aux = _read(made / "auxblob", MAX_AUX_BYTES)
        if self._generation(made) != before + 1:  # 4
            return None
        if provider == "tdx" and len(evidence) > MAX_QUOTE_BYTES:
            raise PreconditionError("this is a DICE quote, not an ECDSA one: it is not supported")
        _check(evidence, most, "outblob")
        _check(aux, MAX_AUX_BYTES, "auxblob")
        return Report(provider, evidence, aux)

    def _provider(self, made: Path) -> str:
        found = self._await(made / "provider", partial(_read, most=64)).decode("ascii", "replace").strip()
        if found not in PROVIDERS:
            raise PreconditionError(f"evidence by {found[:64]!r} is not supported: {', '.join(PROVIDERS)} are")
        return PROVIDERS[found]

    def _generation(self, made: Path) -> int:
        text = self._await(made / "generation", partial(_read, most=32))
        if not text.strip().isdigit():
            raise UnavailableError("generation is not a number: is this folder configfs-tsm?")
        return int(text)

    def _await(self, path: Path, attempt: Callable[[Path], T], seconds: float = 0.0) -> T:
        """What `attempt` finds once the file is there and it finds something. Raises DeadlineError."""
        end = time.monotonic() + (seconds or self._seconds)
        while True:
            with suppress(FileNotFoundError):
                if found := attempt(path):
                    return found
            if time.monotonic() > end:
                raise DeadlineError(f"nobody served {path.name} of a request for evidence in time; try again")
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _directory(self) -> Iterator[Path]:
        """Steps 1 and 5. Errors of the operating system become ours."""
        made = self._folder / f"cleave-{secrets.token_hex(8)}"
        try:
            made.mkdir(mode=0o700)  # 1
            try:
                yield made
            finally:
                _remove(made)  # 5
        except OSError as error:
            raise self._plainly(error) from None

    def _plainly(self, error: OSError) -> CleaveError:
        if error.errno == errno.ENOENT:
            return PreconditionError(_missing(self._folder))
        kind, text = _ADVICE.get(error.errno or 0, (UnavailableError, "the kernel gave no evidence: {}"))
        return kind(text.format(errno.errorcode.get(error.errno or 0, "unknown error")))


_ROOT = "no permission to ask the kernel for evidence: that needs root; the alternative is --evidence none"
_DRIVER = "the kernel has no driver that makes evidence: load sev-guest or tdx_guest inside a confidential VM"
_ADVICE: dict[int, tuple[type[CleaveError], str]] = {
    errno.EACCES: (PreconditionError, _ROOT),
    errno.EPERM: (PreconditionError, _ROOT),
    errno.EROFS: (PreconditionError, "the folder for evidence is read-only: does a sandbox protect /sys?"),
    errno.ENXIO: (PreconditionError, _DRIVER),
    errno.ENOTTY: (PreconditionError, _DRIVER),
    errno.EFBIG: (PreconditionError, "the evidence is larger than this kernel lets through: use a newer kernel"),
    errno.EBUSY: (UnavailableError, "the kernel is busy with other evidence; try again"),
    errno.ETIMEDOUT: (
        DeadlineError,
        "the host did not answer a request for evidence; try again. A SEV-SNP guest may have to be started again",
    ),
}


def _missing(folder: Path) -> str:
    if folder.is_relative_to(CONFIGFS) and not folder.parent.exists() and TPM.exists():
        return f"{folder} is missing, and there is a TPM: if this is Azure, evidence from its vTPM is not supported"
    return (
        f"{folder} is missing: evidence needs a SEV-SNP or TDX guest with Linux 6.7 or later, its driver (sev-guest, "
        "tdx_guest), and configfs (mount -t configfs none /sys/kernel/config)"
    )


def _read(path: Path, most: int) -> bytes:
    """The file, cut off behind one byte more than `most`."""
    with path.open("rb", buffering=0) as file:
        found = b""
        while len(found) <= most and (piece := file.read(most + 1 - len(found))):
            found += piece
        return found


def _write(path: Path, data: bytes) -> int:
    """All of the data in one write, into a file that is there. The number of bytes."""
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if os.write(file, data) != len(data):
            raise UnavailableError("the kernel did not take the report data; try again")
    finally:
        os.close(file)
    return len(data)


def _check(blob: bytes, most: int, name: str) -> None:
    if len(blob) > most:
        raise UnavailableError(f"{name} has more than {most} bytes: this is not evidence that we know")


def _remove(made: Path) -> None:
    """In configfs one call takes the files along; elsewhere they go first, those that appear meanwhile too."""
    for _ in range(REMOVALS):
        with suppress(OSError):
            made.rmdir()
        if not made.exists():
            return
        with suppress(OSError):
            for path in made.iterdir():
                path.unlink(missing_ok=True)
