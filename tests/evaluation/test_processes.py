"""What the kernel says of processes, against what we know of this one."""

import mmap
import os
import subprocess
import sys
import time

import pytest

from evaluation.processes import arena_bytes, cpu_seconds, resident_bytes


def test_cpu_time_is_that_of_the_process() -> None:
    before = cpu_seconds(os.getpid())
    assert abs(before - time.process_time()) < 1
    while time.process_time() < before + 0.1:
        pass
    assert 0.1 <= cpu_seconds(os.getpid()) - before < 1


def test_cpu_time_of_a_child_is_its_own_and_finer_than_a_tick() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        before = cpu_seconds(child.pid)
        while (after := cpu_seconds(child.pid)) < before + 0.002:
            time.sleep(0.0005)
        child.kill()
    assert 0 < after - before < 1


def test_resident_memory_grows_with_what_is_written() -> None:
    before = resident_bytes(os.getpid())
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert resident_bytes(os.getpid()) - before > 48 << 20


def test_secure_memory_counts_as_far_as_it_was_touched() -> None:
    before = arena_bytes(os.getpid())
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ordinary:
        ordinary.write(bytes(16 << 20))
        assert arena_bytes(os.getpid()) == before
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as arena:
        arena.madvise(mmap.MADV_DONTDUMP)
        arena.madvise(18)  # MADV_WIPEONFORK
        arena.madvise(mmap.MADV_NOHUGEPAGE)
        arena.write(bytes(4 << 20))
        assert arena_bytes(os.getpid()) - before == 4 << 20


def test_a_process_that_is_gone_is_an_error() -> None:
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    for read in (arena_bytes, resident_bytes):
        with pytest.raises(OSError, match="No such file"):
            read(gone)
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_seconds(gone)
