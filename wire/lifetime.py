"""Children die with their parent (Linux: PR_SET_PDEATHSIG)."""

import ctypes
import os
import signal
import sys

from wire.errors import PreconditionError

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when process `parent`, which must be its parent, ends.

    Raises PreconditionError when the parent is already gone. Only Linux has the call; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise PreconditionError("the parent process is already gone")
