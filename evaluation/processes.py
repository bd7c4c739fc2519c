"""What processes cost, as the kernel counts it: CPU time and resident memory (Linux)."""

import os
import time
from pathlib import Path

_PROCESS_CLOCK = 2  # clock_getcpuclockid(3): what the scheduler counted for the process of this number
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ARENA = {"wf", "dd"}  # a mapping that is wiped in a forked child and left out of core dumps


def cpu_seconds(pid: int) -> float:
    """CPU time of a process since it started, all threads, to the nanosecond. Raises OSError when it is gone."""
    return time.clock_gettime(~pid << 3 | _PROCESS_CLOCK)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process. Raises OSError when it is gone."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def arena_bytes(pid: int) -> int:
    """Resident part of a trusted worker's secure memory, known by its protections. Raises OSError when it is gone.

    And when the process may not be looked at: it is not dumpable, so only root may.
    """
    total = resident = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Rss":
            resident = int(value.split()[0]) << 10
        elif name == "VmFlags" and set(value.split()) >= _ARENA:
            total += resident
    return total
