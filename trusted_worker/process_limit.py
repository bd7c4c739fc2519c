"""A bound on the memory of the whole process, kept by the kernel: the arena, and the interpreter and gRPC around it.

Tried in this order: a control group (v2) that somebody has limited around us already; one of our own, where groups are
delegated to us; RLIMIT_DATA, which counts private writable memory, the stacks of threads included; nothing. Beyond the
limit of a group the kernel ends the process, beyond RLIMIT_DATA an allocation fails.
"""

import contextlib
import mmap
import os
import re
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from wire.errors import ExhaustedError

# Private writable memory that a worker takes after its imports, beside the arena. Measured with the demo model and 4 to
# 12 clients: 120 MiB on 2 cores and 215 MiB on 64 (as the libraries saw it), the same at rest and under load. It is
# reserved rather than used, 20 to 60 MiB are resident: 8 MiB for the stack of each of gRPC's threads, of which it
# starts up to 16, and 32 MiB for a buffer of the BLAS. What is more is for gRPC's buffers: logits of 16 rows
# over a vocabulary of 150,000 go through them, 10 MiB, two or three times. Threads of the BLAS, 40 MiB each, start when
# numpy is imported, so they are in the part that is measured here.
LEAST = 256 << 20
ALLOWANCE = 512 << 20
GROUPS, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self")


@dataclass(frozen=True)
class ProcessLimit:
    """What bounds the process: "cgroup", "rlimit-data" or "not enforced", and at how many bytes."""

    kind: str = "not enforced"
    bytes: int = 0


def enforce(
    budget: int, asked: int | None, spill_dir: str | None, groups: Path = GROUPS, process: Path = PROCESS
) -> ProcessLimit:
    """Limit this process, after its imports and before its arena. `asked`: bytes; None: what is needed; 0: no limit.

    Raises ExhaustedError for a limit, asked for or found, that would end the process soon.
    """
    if asked == 0 or sys.platform != "linux":
        return ProcessLimit()
    taken, resident = _taken(process)
    limit = taken + budget + ALLOWANCE if asked is None else asked
    if limit < (least := taken + budget + LEAST):
        raise ExhaustedError(f"--process-memory is too small: with this budget it must be at least {_mib(least)}")
    group = _group(groups, process)
    above = _limit_above(group, groups) if group else None
    if above is not None and above < budget + resident:
        raise ExhaustedError(
            f"the control group of this process has {_mib(above)}: too little for the memory budget and the "
            f"{_mib(resident)} that it takes already; raise MemoryMax (systemd) or mem_limit (compose)"
        )
    if above is not None and above <= limit:
        return ProcessLimit("cgroup", above)
    if group and not _in_memory(spill_dir or tempfile.gettempdir(), process) and _confine(group, limit):
        return ProcessLimit("cgroup", limit)
    return _limit_data(limit)


def _mib(count: int) -> str:
    return f"{-(-count >> 20)}MiB"


def _taken(process: Path) -> tuple[int, int]:
    """Bytes of private writable memory, and of resident memory."""
    text = (process / "status").read_text()
    data, resident = (re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE) for name in ("VmData", "VmRSS"))
    return (int(data[1]) << 10 if data else 0), (int(resident[1]) << 10 if resident else 0)


def _group(groups: Path, process: Path) -> Path | None:
    """The control group (v2) of this process; None where it cannot be seen."""
    with contextlib.suppress(OSError):
        found = re.search(r"^0::/(.*)$", (process / "cgroup").read_text(), re.MULTILINE)
        path = groups / found[1] if found and ".." not in Path(found[1]).parts else None
        return path if path and (path / "cgroup.procs").exists() else None
    return None


def _limit_above(group: Path, groups: Path) -> int | None:
    """The smallest limit of the group and of those around it."""
    limits = []
    for one in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no file in the outermost group; "max" is no number
            limits.append(int((one / "memory.max").read_text()))
        if one == groups:
            break
    return min(limits, default=None)


def _in_memory(folder: str, process: Path) -> bool:
    """Whether files in that folder are memory, which a group's limit counts: what is parked there must not end us."""
    with contextlib.suppress(OSError):
        device = os.stat(folder).st_dev
        for line in (process / "mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    return False


def _confine(group: Path, limit: int) -> bool:
    """Move to a limited group below `group`, if that is delegated to us and nobody else is in it; else stay."""
    pid, child = str(os.getpid()), group / f"cleave-{os.getpid()}"
    try:
        if (group / "cgroup.procs").read_text().split() != [pid]:
            return False
        child.mkdir()
    except OSError:
        return False
    try:
        _write(child / "cgroup.procs", pid)  # first: a group hands controllers on only when nobody is in it
        _write(group / "cgroup.subtree_control", "+memory")
        _write(child / "memory.max", str(limit))
        if (child / "memory.swap.max").exists():
            _write(child / "memory.swap.max", "0")
        return True
    except OSError:
        with contextlib.suppress(OSError):
            _write(group / "cgroup.procs", pid)
            child.rmdir()
        return False


def _write(path: Path, text: str) -> None:
    """Into a file that the kernel offers; it is not created. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _limit_data(limit: int) -> ProcessLimit:
    """RLIMIT_DATA, for good, and a try whether the kernel means it."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    except (OSError, ValueError):
        return ProcessLimit()
    try:
        mmap.mmap(-1, limit, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return ProcessLimit("rlimit-data", limit)
    return ProcessLimit()
