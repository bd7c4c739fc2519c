"""What processes cost, as the kernel counts it: CPU time and resident memory (Linux, /proc)."""

import os
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ARENA = {"wf", "dd"}  # a mapping that is wiped in a forked child and left out of core dumps


def cpu_seconds(pid: int) -> float:
    """CPU time of a process since it started, all threads, in ticks of 10 ms. Raises OSError when it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


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
