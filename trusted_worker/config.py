"""Settings of the trusted worker: flags, environment and file in, one frozen object out. Imports no numpy."""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wire import logs, profiles, settings, tls

PREFIX = "CLEAVE_TRUSTED_"
SCHEMES = ("plain", "split", "tee-only", "kv-shield", "secure-infer")
PRECISIONS = ("float32", "int8")
PREFILL = ("auto", "inside", "worker")
KV_TYPES = ("float32", "float16", "int8")
EMBED = ("auto", "client")
PROJECTIONS = ("gpu", "trusted", "auto")
DATA_PLANES = ("grpc", "stream")
EVIDENCE = ("none", "tsm")
TSM_DIR = Path("/sys/kernel/config/tsm/report")
MOST_PERTURBATION = 8.0  # logits
DEFAULT_BUDGET = 64 << 20
MOST_SWITCH_US = 1_000_000
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Settings:
    """What a trusted worker is told when it starts."""

    listen: str
    gpu_worker: str
    data_plane: str
    stream: str | None  # address; None: calls go over gRPC
    model: Path
    scheme: str
    precision: str
    tee_profile: str  # a name of wire/profiles.py; empty: none
    memory_budget: int
    process_memory: int | None  # of the whole process; None: the budget and an allowance, 0: not limited
    pad_bank: int
    spill_dir: str | None
    switch_us: int  # charged as one world switch for each exchange with the GPU worker
    prefill: str
    embed: str
    projections: str
    rope: str
    kv_dtype: str
    rotate_every: int
    seal_idle: bool
    model_key_file: Path | None
    max_context: int
    connect_seconds: float
    step_seconds: float
    request_seconds: float
    session_seconds: float
    allocation_seconds: float
    drain_seconds: float
    threads: int
    evidence: str
    tsm_dir: Path
    certificates: list[Path]
    collateral: list[Path]
    evidence_per_minute: int
    adapter_memory: int  # of the memory budget
    insecure_clear_adapter: list[str]  # NAME=DIR
    least_perturbation: float
    reflection: bool
    metrics: str | None
    log_format: str
    tls_certificate: Path | None
    tls_key: Path | None
    tls_authority: Path | None
    insecure_plaintext: bool
    insecure_unchecked_tiles: bool
    parent: int | None


def size(text: str) -> int:
    """Bytes from "64MiB", "1GiB" or a plain number. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+)(|KiB|MiB|GiB)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 67108864, 65536KiB, 64MiB or 1GiB")
    return int(match[1]) * _UNITS[match[2]]


def count(text: str) -> int:
    """A number that is not negative. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def seconds(text: str) -> float:
    """A positive, finite time. Raises ValueError or argparse.ArgumentTypeError."""
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")
    return value


def logits(text: str) -> float:
    """A difference of logits. Raises ValueError or argparse.ArgumentTypeError."""
    value = float(text)
    if not 0 <= value <= MOST_PERTURBATION:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {MOST_PERTURBATION:g}")
    return value


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from a command line; exits with 2 and one line on what is wrong."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="cleave-trusted-worker",
        description="The trusted half of a cleaved model: run it inside a TEE.",
    )
    _add_model_flags(parser)
    _add_memory_flags(parser)
    _add_kv_shield_flags(parser)
    _add_adapter_flags(parser)
    _add_evidence_flags(parser)
    _add_service_flags(parser)
    tls.add_flags(parser)
    given = settings.parse(parser, sys.argv[1:] if arguments is None else arguments, PREFIX)
    given["precision"] = given["precision"] or ("float32" if given["scheme"] == "kv-shield" else "int8")
    given["tee_profile"] = given["tee_profile"] or ""
    for name in ("certificates", "collateral", "insecure_clear_adapter"):
        given[name] = given[name] or []
    _check(parser, given)
    given["stream"] = _stream(parser, given)
    try:
        given["memory_budget"] = profiles.budget(given["tee_profile"], given["memory_budget"], DEFAULT_BUDGET)
    except ValueError as error:
        parser.error(str(error))
    if given["threads"] == 0:
        given["threads"] = (os.cpu_count() or 1) if given["scheme"] == "tee-only" else 1
    return Settings(**given)


def _check(parser: argparse.ArgumentParser, given: dict[str, Any]) -> None:
    """What does not go together."""
    scheme = given["scheme"]
    if scheme == "secure-infer" and given["precision"] != "int8":
        parser.error("secure-infer computes in a ring of integers: use --precision int8")
    if scheme == "kv-shield" and given["precision"] != "float32":
        parser.error("kv-shield computes in float32: leave --precision out; --kv-dtype makes its cache smaller")
    if scheme != "kv-shield" and (given["rope"] != "trusted" or given["rotate_every"] or given["seal_idle"]):
        parser.error("--rope, --rotate-every and --seal-idle belong to --scheme kv-shield")
    if scheme != "secure-infer" and given["projections"] != "gpu":
        parser.error("--projections belongs to --scheme secure-infer")
    if scheme not in ("kv-shield", "tee-only") and given["model_key_file"]:
        parser.error("a sealed model can only be served by --scheme kv-shield or tee-only")
    if given["switch_us"] > MOST_SWITCH_US:
        parser.error(f"--switch-us {given['switch_us']} is more than a second")
    if scheme in ("kv-shield", "plain") and given["embed"] == "client":
        parser.error("--embed client is for schemes whose decoder runs in the trusted worker; this one embeds outside")


def _stream(parser: argparse.ArgumentParser, given: dict[str, Any]) -> str | None:
    """The address that calls go to, where they do not go over gRPC."""
    if given["data_plane"] == "grpc" or given["scheme"] == "tee-only":
        if given["stream"] and given["data_plane"] == "grpc":
            parser.error("--stream belongs to --data-plane stream")
        return None
    address: str | None = given["stream"] or settings.stream_beside(given["gpu_worker"])
    if address is None:
        parser.error("--data-plane stream needs a GPU worker on a Unix socket, or --stream ADDR as that worker has it")
    return address


def _add_kv_shield_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("kv-shield").add_argument
    add("--rope", choices=("trusted", "worker"), default="trusted", help="worker: permute V only, one crossing a layer")
    add("--rotate-every", type=count, default=0, metavar="N", help="new permutations every N tokens (default: never)")
    add("--seal-idle", action="store_true", help="park the cache of an idle conversation here, sealed")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder in Hugging Face layout")
    add("--scheme", choices=SCHEMES, default="secure-infer")
    add("--precision", choices=PRECISIONS, help="default: int8; float32 for kv-shield")
    add("--model-key-file", type=Path, metavar="FILE", help="key of a model that `seal-model` sealed")
    add("--prefill", choices=PREFILL, default="auto", help="where prompt rows of secure-infer are multiplied")
    add("--projections", choices=PROJECTIONS, default="gpu", help="where secure-infer has qkv and o; auto: measured")
    add("--embed", choices=EMBED, default="auto", help="client: it sends the embeddings of its tokens itself")
    add("--kv-dtype", choices=KV_TYPES, default="float32", help="elements of KV caches (default: float32)")
    add("--max-context", type=count, default=0, help="most tokens of one session (default: the model's)")
    add("--threads", type=count, default=0, help="BLAS threads (default: all cores for tee-only, else 1)")


def _add_memory_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tee-profile", choices=tuple(profiles.PROFILES), help="secure memory as a real TEE has it; cvm: as you say")
    add("--memory-budget", type=size, metavar="SIZE", help="secure memory, exactly (default: 64MiB)")
    add(
        "--process-memory",
        type=size,
        metavar="SIZE",
        help="most memory of the whole process, by cgroup or RLIMIT_DATA; 0: no limit (default: budget and allowance)",
    )
    add("--pad-bank", type=size, default="64MiB", help="sealed pads kept outside the budget (default: 64MiB)")
    add("--spill-dir", default=None, help="where sealed pads and pages are parked (default: the temporary folder)")
    add("--switch-us", type=count, default=0, metavar="N", help="microseconds charged for each exchange (default: 0)")
    add("--insecure-unchecked-tiles", action="store_true", help="use streamed weights without comparing their digests")


def _add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA adapters and released logits").add_argument
    add("--adapter-memory", type=size, default="0", metavar="SIZE", help="of the budget, for adapters (default: none)")
    add(
        "--insecure-clear-adapter",
        action="append",
        metavar="NAME=DIR",
        help="load this PEFT folder, which lies here in the clear, for every client; repeatable",
    )
    add("--least-perturbation", type=logits, default=0.0, metavar="B", help="of all released logits (default: 0)")


def _add_evidence_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evidence").add_argument
    add("--evidence", choices=EVIDENCE, default="none", help="tsm: the kernel's configfs (default: none, no TEE)")
    add("--tsm-dir", type=Path, default=TSM_DIR, metavar="DIR", help="where it is (default: %(default)s)")
    add("--certificates", type=Path, action="append", metavar="FILE", help="travel with SEV-SNP evidence; repeatable")
    add("--collateral", type=Path, action="append", metavar="FILE", help="travel with evidence; repeatable")
    add("--evidence-per-minute", type=count, default=30, metavar="N", help="made afresh, at most (default: 30)")


def _add_service_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--listen", default="127.0.0.1:0", help="HOST:PORT or unix:PATH for clients")
    add("--gpu-worker", default="", help="HOST:PORT or unix:PATH of the GPU worker")
    add("--data-plane", choices=DATA_PLANES, default="grpc", help="to the GPU worker (default: grpc)")
    add(
        "--stream",
        type=settings.stream_address,
        metavar="ADDR",
        help="unix:PATH or vsock:CID:PORT, of the GPU worker (default: beside its Unix socket, PATH.stream)",
    )
    add("--reflection", action="store_true", help="answer gRPC reflection")
    add("--metrics", metavar="HOST:PORT", help="Prometheus endpoint on this machine (default: none)")
    add("--log-format", choices=logs.FORMATS, default="text")
    waits = parser.add_argument_group("deadlines, in seconds").add_argument
    waits("--connect-seconds", type=seconds, default=10.0, help="until the GPU worker answers (default: 10)")
    waits("--step-seconds", type=seconds, default=60.0, help="of one exchange with it (default: 60)")
    waits("--request-seconds", type=seconds, default=120.0, help="of a client's call for its turn (default: 120)")
    waits("--allocation-seconds", type=seconds, default=60.0, help="of Open, for its memory (default: 60)")
    waits("--session-seconds", type=seconds, default=300.0, help="a session outlives its client (default: 300)")
    waits("--drain-seconds", type=seconds, default=30.0, help="answers go on after SIGTERM (default: 30)")
    add("--insecure-plaintext", action="store_true", help="allow addresses that other machines can reach")
    add("--parent", type=int, default=None, help="end when this process ends")
