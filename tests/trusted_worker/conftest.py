"""What several files here need: a child process to look from, and an arena."""

import os
from collections.abc import Callable

import pytest

from trusted_worker.secure_memory import SecureMemory

InChild = Callable[[Callable[[], bool]], bool]


@pytest.fixture
def in_child() -> InChild:
    """`in_child(work)`: whether `work` returned True in a forked child of this process."""

    def run(work: Callable[[], bool]) -> bool:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = 0 if work() else 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return run


@pytest.fixture
def memory() -> SecureMemory:
    """An arena of 4 MiB."""
    return SecureMemory(4 << 20)
