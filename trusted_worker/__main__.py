"""Command `cleave-trusted-worker`: settings, process hygiene, then the service."""

import ctypes
import logging
import os
import resource
import sys
from typing import NoReturn

from trusted_worker.config import parse
from wire import logs
from wire.allocation import keep_freed
from wire.errors import CleaveError
from wire.lifetime import die_with_parent

KEPT_BYTES = 8 << 20  # of freed memory: frames, not more
_PRCTL = {"not dumpable": (4, 0), "no new privileges": (38, 1)}  # PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS


def main() -> None:
    """Run until SIGTERM or SIGINT. Exit status 2 with one line on stderr for a bad model, address or budget."""
    if sys.argv[1:2] == ["seal-model"]:
        from trusted_worker import sealed_model

        sys.exit(sealed_model.run(sys.argv[2:]))
    settings = parse()
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    logs.setup("trusted-worker", settings.log_format)
    from trusted_worker import process_limit, serving  # numpy is imported here, after its threads are fixed

    try:
        if settings.parent is not None:
            die_with_parent(settings.parent)
        _harden()
        if (
            settings.scheme != "tee-only" and settings.data_plane == "grpc"
        ):  # whose messages would be paged in each time
            keep_freed(KEPT_BYTES)
        limit = process_limit.enforce(settings.memory_budget, settings.process_memory, settings.spill_dir)
        serving.run(settings, limit)
    except CleaveError as error:
        _refuse(str(error))
    except MemoryError:
        _refuse("the process reached the limit of its memory: raise --process-memory")


def _refuse(text: str) -> NoReturn:
    print(f"cleave-trusted-worker: {text}", file=sys.stderr)
    sys.exit(2)


def _harden() -> None:
    """No core dumps, no ptrace by the same user, no new privileges."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        for name, (option, value) in _PRCTL.items():
            if libc.prctl(option, value, 0, 0, 0) != 0:
                logging.warning("the kernel refused: %s", name)


if __name__ == "__main__":
    main()
