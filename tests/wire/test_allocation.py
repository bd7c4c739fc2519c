"""malloc keeps what is freed: a message of a usual size costs no page faults the second time."""

import subprocess
import sys

PROGRAM = """
import resource, sys
from wire.allocation import keep_freed
keep_freed(32 << 20)
def work():
    blocks = [bytearray(b"x") * 600_000 for _ in range(8)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_blocks_are_used_again() -> None:
    """Given back each time, 50 rounds of 8 blocks of 147 pages are 58,800 page faults."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 5_000
