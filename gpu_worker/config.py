"""Settings of the GPU worker: flags, environment and file in, one frozen object out. Imports no torch."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from wire import logs, settings, tls
from wire.channel import is_local
from wire.errors import PreconditionError
from wire.model_config import ModelConfig

PREFIX = "CLEAVE_GPU_"


@dataclass(frozen=True)
class Settings:
    """What a GPU worker is told when it starts."""

    listen: str
    stream: str | None  # None: no stream socket
    model: list[Path]
    device: str
    ops: str
    threads: int
    request_seconds: float
    drain_seconds: float
    reflection: bool
    metrics: str | None
    log_format: str
    record: Path | None
    record_keep: int | None
    tls_certificate: Path | None
    tls_key: Path | None
    tls_authority: Path | None
    insecure_plaintext: bool
    parent: int | None

    @property
    def ring_only(self) -> bool:
        """Whether everything but ring products is refused."""
        return self.ops == "ring"

    def folders(self) -> dict[str, Path]:
        """The model folders by name. Raises PreconditionError or CheckpointError with what to change."""
        folders: dict[str, Path] = {}
        for folder in self.model:
            name = ModelConfig.from_hf(folder).name
            if name in folders:
                raise PreconditionError(f"two model folders are called {name}")
            folders[name] = folder
        return folders

    def tls(self) -> tls.Tls | None:
        """None: plaintext. Raises DeniedError or PreconditionError where this machine would not be left unharmed."""
        files = tls.from_flags(self.tls_certificate, self.tls_key, self.tls_authority)
        if files is None and not is_local(self.listen) and not self.insecure_plaintext:
            raise PreconditionError(
                f"--listen {self.listen} is reachable from other machines and traffic is not encrypted: listen on "
                "127.0.0.1 or a Unix socket, give the --tls-* files, or say --insecure-plaintext"
            )
        return files


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from a command line; exits with 2 and what is wrong."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="cleave-gpu-worker",
        description="The untrusted half of a cleaved model: runs big products, on a GPU where there is one.",
        epilog=f"Every flag is also a variable ({PREFIX}DRAIN_SECONDS=10) and a key of the TOML file (drain-seconds = "
        "10). Flags go before variables, variables before the file. SIGTERM or SIGINT drains: calls under way may "
        "end, new streams are refused; a second one ends at once.",
    )
    _add_flags(parser)
    tls.add_flags(parser)
    given = settings.parse(parser, sys.argv[1:] if arguments is None else arguments, PREFIX)
    if given["record_keep"] and not given["record"]:
        parser.error("--record-keep needs --record")
    given["stream"] = given["stream"] or settings.stream_beside(given["listen"])
    return Settings(**given)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--listen", type=_address, default="127.0.0.1:0", metavar="ADDR", help="HOST:PORT (0: any port) or unix:PATH")
    add(
        "--stream",
        type=settings.stream_address,
        metavar="ADDR",
        help="unix:PATH or vsock:CID:PORT of the stream socket (default: beside a Unix socket, PATH.stream; else none)",
    )
    add("--model", required=True, action="append", type=Path, metavar="DIR", help="a model; may be repeated")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, cuda where there is one")
    add("--ops", choices=("all", "ring"), default="all", help="ring: refuse everything but ring products")
    add("--threads", type=_count, default=os.cpu_count() or 1, metavar="N", help="of the CPU (default: all cores)")
    add("--request-seconds", type=_seconds, default=60.0, metavar="S", help="for the frames of one call (default: 60)")
    add("--drain-seconds", type=_seconds, default=5.0, metavar="S", help="for calls under way at the end (default: 5)")
    add("--reflection", action="store_true", help="answer gRPC reflection")
    add("--metrics", metavar="HOST:PORT", help="Prometheus endpoint, for this machine only (default: none)")
    add("--log-format", choices=logs.FORMATS, default="text", help="of stderr (default: text)")
    add("--record", type=Path, metavar="DIR", help="write all that this worker receives, sends and holds there")
    add("--record-keep", type=_count, metavar="N", help="of a recording, the last N times 64 MiB (default: all)")
    add("--insecure-plaintext", action="store_true", help="allow --listen beyond this machine without TLS")
    add("--parent", type=int, metavar="PID", help="end when this process, the parent, ends")


def _address(text: str) -> str:
    port = text.rpartition(":")[2]
    if not text.startswith("unix:") and not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} has no port, which must be a number below 65536")
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")
    return value
