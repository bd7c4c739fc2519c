"""Command line of the GPU worker. Prints one line on stdout once it listens: `listening on ADDRESS`."""

import asyncio
import logging
import os
import sys

from gpu_worker.config import parse
from wire import logs
from wire.allocation import keep_freed
from wire.errors import CleaveError
from wire.lifetime import die_with_parent

# OpenMP threads that wait actively for longer keep the cores from everybody else: twenty times slower when shared.
SPIN_COUNT = "2000"
KEPT_BYTES = 64 << 20  # of freed memory


def main() -> None:
    """Serve until SIGTERM or SIGINT. Exit code 2 and one line on stderr for settings that cannot work."""
    settings = parse()
    logs.setup("gpu-worker", settings.log_format)
    keep_freed(KEPT_BYTES)
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    from gpu_worker.service import serve

    try:
        if settings.parent is not None:
            die_with_parent(settings.parent)
        loop = asyncio.new_event_loop()  # never closed: asyncio.run would cancel what gRPC still winds up, with noise
        loop.run_until_complete(serve(settings))
    except CleaveError as error:
        print(f"cleave-gpu-worker: {error}", file=sys.stderr)
        sys.exit(2)
    logging.shutdown()
    os._exit(0)  # the compute thread may be compiling or reading weights; there is nothing to wait for


if __name__ == "__main__":
    main()
