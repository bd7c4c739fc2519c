"""`cleave doctor`: what this machine can do and what is missing, one line each.

A line is `ok`, `missing` (with what to do) or `absent` (hardware that this machine does not have; nothing is wrong).
Nothing heavy is imported: versions come from the packages' metadata.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from client.terminal import size

_INSTALL = "run `make install`"
_PACKAGES = {  # and who needs them
    "numpy": "every worker",
    "grpcio": "every worker",
    "protobuf": "every worker",
    "pycryptodome": "the trusted worker",
    "torch": "the GPU worker",
    "numba": "the GPU worker",
    "tokenizers": "the client",
    "jinja2": "the client",
    "cryptography": "the client",
    "starlette": "the gateway",
    "uvicorn": "the gateway",
}
_CPU_FLAGS = {
    "avx2": "int8 products and attention are several times slower without it",
    "avx512f": "not needed; faster where it is there",
    "aes": "pads are made and sealed much slower without it",
}
_TEE = {
    "/dev/sev-guest": "not an AMD SEV-SNP guest",
    "/dev/tdx_guest": "not an Intel TDX guest",
    "/sys/kernel/config/tsm/report": "no attestation reports from the kernel (configfs-tsm)",
}
_SMI_SECONDS = 10.0
_CAP_IPC_LOCK = 14  # of linux/capability.h


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: str  # ok, missing, absent
    what: str
    advice: str = ""
    required: bool = False


def run(demo_model: Path) -> int:
    """Print the report; returns 1 when something required is missing."""
    findings = [
        Finding("ok", f"Python {platform.python_version()}"),
        *(_package(name, user) for name, user in _PACKAGES.items()),
        *_machine(),
        *_cpu(_proc_flags()),
        _cuda(),
        *(_path(Path(path), advice) for path, advice in _TEE.items()),
        _demo(demo_model),
    ]
    for finding in findings:
        advice = f": {finding.advice}" if finding.advice else ""
        print(f"{finding.state:<8} {finding.what}{advice}")
    return int(any(finding.required and finding.state == "missing" for finding in findings))


def _package(name: str, user: str) -> Finding:
    try:
        return Finding("ok", f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Finding("missing", name, f"{user} cannot run; {_INSTALL}", required=True)


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    free = limit == resource.RLIM_INFINITY or _locks_freely()
    locked = "unlimited" if free else size(limit)
    advice = "" if free else "a larger secure memory is not locked; raise `ulimit -l`"
    groups = Path("/sys/fs/cgroup/cgroup.controllers")
    limited = groups.is_file() and "memory" in groups.read_text().split()
    return [
        Finding("ok", f"{cores} cores"),
        Finding("ok", f"{size(memory)} of memory"),
        Finding("ok", f"up to {locked} of locked memory", advice),
        Finding("ok", "control groups (v2) with memory")
        if limited
        else Finding("absent", "control groups (v2) with memory", "RLIMIT_DATA bounds the trusted worker's process"),
    ]


def _locks_freely(status: Path = Path("/proc/self/status")) -> bool:
    """Whether no limit of locked memory holds for this process: root's usual case."""
    lines = status.read_text().splitlines() if status.exists() else []
    held = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(held >> _CAP_IPC_LOCK & 1)


def _proc_flags() -> set[str]:
    """The CPU's feature flags; empty where /proc/cpuinfo does not list them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _cpu(flags: set[str]) -> list[Finding]:
    return [
        Finding("ok", f"CPU has {flag}") if flag in flags else Finding("absent", f"CPU flag {flag}", advice)
        for flag, advice in _CPU_FLAGS.items()
    ]


def _cuda() -> Finding:
    absent = Finding("absent", "CUDA device", "the GPU worker computes on the CPU")
    smi = shutil.which("nvidia-smi")
    if not smi:
        return absent
    query = [smi, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return Finding("missing", "CUDA device", "nvidia-smi is there but fails; check the driver")
    return Finding("ok", f"CUDA device {'; '.join(found.split(chr(10))).strip('; ')}") if found.strip() else absent


def _path(path: Path, advice: str) -> Finding:
    return Finding("ok", str(path)) if path.exists() else Finding("absent", str(path), advice)


def _demo(folder: Path) -> Finding:
    lacking = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / name).is_file()]
    if not lacking:
        return Finding("ok", f"demo model in {folder}")
    return Finding("missing", f"demo model in {folder}", f"no {', '.join(lacking)}; chat needs --model DIR")
