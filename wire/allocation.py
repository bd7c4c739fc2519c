"""What malloc does with freed memory.

By default glibc gives large blocks back to the kernel as soon as they are free. Every message of some hundred KB then
costs a page fault for each 4 KiB of it, several times over: measured, two thirds of a gRPC exchange of 608 KB.
"""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_LARGE = 4 << 20  # larger blocks are the kernel's


def keep_freed(size: int) -> None:
    """Keep up to `size` bytes of what is freed. Does nothing where malloc is not glibc's."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, size)
