"""Command line of the GPU worker. Prints one line on stdout once it listens: `listening on ADDRESS`."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_worker.server import Compute, Servicer, make_server
from wire.channel import is_local
from wire.errors import CleaveError, PreconditionError
from wire.lifetime import die_with_parent
from wire.model_config import ModelConfig

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger("gpu_worker")

GRACE_SECONDS = 0.5
# OpenMP threads that wait actively for longer keep the cores from everybody else: twenty times slower when shared.
SPIN_COUNT = "2000"


def main() -> None:
    """Serve until SIGTERM or SIGINT. Exit code 2 for options that cannot work."""
    options = _parse()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        if options.parent is not None:
            die_with_parent(options.parent)
        loop = asyncio.new_event_loop()  # never closed: asyncio.run would cancel what gRPC still winds up, with noise
        loop.run_until_complete(_serve(options, _check(options)))
    except CleaveError as error:
        print(f"cleave-gpu-worker: {error}", file=sys.stderr)
        sys.exit(2)
    logging.shutdown()
    os._exit(0)  # the compute thread may be compiling or reading weights; there is nothing to wait for


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="cleave-gpu-worker", description="The untrusted worker: runs big products."
    )
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="ADDR", help="HOST:PORT (port 0: any) or unix:PATH")
    parser.add_argument("--model", required=True, action="append", type=Path, metavar="DIR", help="may be repeated")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--ops", choices=("all", "ring"), default="all", help="ring: refuse everything but ring products"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process, the parent, ends")
    parser.add_argument("--insecure-plaintext", action="store_true", help="allow --listen beyond this machine")
    return parser.parse_args()


def _check(options: argparse.Namespace) -> dict[str, Path]:
    """The model folders by name. Raises PreconditionError or CheckpointError with what to change."""
    if not is_local(options.listen) and not options.insecure_plaintext:
        raise PreconditionError(
            f"--listen {options.listen} is reachable from other machines and traffic is not encrypted: "
            "listen on 127.0.0.1 or a Unix socket, or say --insecure-plaintext"
        )
    port = options.listen.rpartition(":")[2]
    if not options.listen.startswith("unix:") and not (port.isdecimal() and int(port) < 1 << 16):
        raise PreconditionError(f"--listen {options.listen}: the port must be a number below 65536")
    if options.threads < 1:
        raise PreconditionError("--threads must be at least 1")
    folders: dict[str, Path] = {}
    for folder in options.model:
        name = ModelConfig.from_hf(folder).name
        if name in folders:
            raise PreconditionError(f"two model folders are called {name}")
        folders[name] = folder
    return folders


async def _serve(options: argparse.Namespace, folders: dict[str, Path]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    compute = Compute(lambda: _make_worker(options, folders))
    if options.device == "cuda":
        await compute.worker()
    server = make_server(Servicer(compute, list(folders), options.ops == "ring"))
    try:
        port = server.add_insecure_port(options.listen)
    except RuntimeError as error:
        raise PreconditionError(f"cannot listen on {options.listen}: is the address in use?") from error
    await server.start()
    host = options.listen if options.listen.startswith("unix:") else f"{options.listen.rpartition(':')[0]}:{port}"
    print(f"listening on {host}", flush=True)
    await stop.wait()
    log.info("stopping")
    await server.stop(GRACE_SECONDS)  # streams that end now still drop what they reserved
    compute.stop()


def _make_worker(options: argparse.Namespace, folders: dict[str, Path]) -> "Worker":
    """Runs in the compute thread: torch and numba keep their number of threads per calling thread."""
    import numba
    import torch

    from gpu_worker.worker import Worker

    torch.set_num_threads(options.threads)
    numba.set_num_threads(min(options.threads, numba.get_num_threads()))
    return Worker(folders, options.device, options.ops == "ring")


if __name__ == "__main__":
    main()
