"""The images hold one role each and enough of it, and the compose file keeps the workers apart and locked down.

There is no container engine in the tests: nothing is built. What the images would hold is put together in a folder.
"""

import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from trusted_worker.config import size

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "compose"
BIN = Path(sys.executable).parent
ROLES = ("trusted_worker", "gpu_worker")
LEFT_OUT = {"trusted_worker": [], "gpu_worker": ["wire/sealing.py"]}  # of what is copied
INSTALLED = {
    "trusted_worker": {"grpcio", "grpcio-health-checking", "numpy", "protobuf", "pycryptodome"},
    "gpu_worker": {"grpcio", "grpcio-health-checking", "numpy", "protobuf", "torch", "numba"},
}
IMPORTED = {"pycryptodome": "Crypto", "grpcio": "grpc", "grpcio-health-checking": "grpc_health", "protobuf": "google"}
GIB = 1 << 30
PROCESS = 256 << 20  # interpreter, libraries and buffers


def containerfile(role: str) -> list[str]:
    """Its instructions, one line each."""
    text = (FOLDER / f"{role.replace('_', '-')}.Containerfile").read_text()
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return [line for line in kept.replace("\\\n", " ").splitlines() if line]


def copied(role: str) -> list[tuple[str, str]]:
    """(from, to) of every COPY."""
    return [(words[1], words[2]) for words in map(str.split, containerfile(role)) if words[0] == "COPY"]


def installed(role: str) -> set[str]:
    """What pip is told to install."""
    words = {word for line in containerfile(role) if "pip install" in line for word in line.split()}
    return words & set().union(*INSTALLED.values())


def services() -> dict[str, dict[str, Any]]:
    """Those of the compose file, with no variable set."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (FOLDER / "compose.yaml").read_text())
    composed: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return composed


def resolved(role: str) -> dict[str, Any]:
    """What the worker makes of the variables that the image and the compose file set."""
    environment: dict[str, str] = {}
    for line in containerfile(role):
        if line.startswith("ENV "):
            environment |= dict(pair.split("=", 1) for pair in line.split()[1:])
    environment |= services()[role.replace("_", "-")]["environment"]
    command = [sys.executable, "-m", role, "--print-config"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    return tomllib.loads(printed.stdout)


def tool(name: str, *arguments: str) -> None:
    """A linter has nothing to say."""
    if not (BIN / name).exists():
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([str(BIN / name), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_linters_find_nothing() -> None:
    tool("hadolint", *map(str, sorted(FOLDER.glob("*.Containerfile"))))
    tool("yamllint", "--strict", "-c", str(FOLDER / "yamllint.yaml"), str(FOLDER))
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(FOLDER / "compose.yaml"))


@pytest.mark.parametrize("role", ROLES)
def test_an_image_holds_wire_and_its_own_role(role: str) -> None:
    assert copied(role) == [("wire/", "/opt/cleave/wire/"), (f"{role}/", f"/opt/cleave/{role}/")]
    assert installed(role) == INSTALLED[role]
    assert not any(line.startswith("ADD ") for line in containerfile(role))
    ignored = (FOLDER / f"{role.replace('_', '-')}.Containerfile.dockerignore").read_text().splitlines()
    assert [line for line in ignored if not line.startswith("#")] == [
        "*",
        "!constraints.txt",
        "!wire",
        f"!{role}",
        "**/__pycache__",
        *LEFT_OUT[role],
    ]


@pytest.mark.parametrize("role", ROLES)
def test_an_image_is_enough(role: str, tmp_path: Path) -> None:
    """Everything that is copied is imported, with the other roles and the other image's packages absent."""
    for source, _ in copied(role):
        shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LEFT_OUT[role]:
        (tmp_path / name).unlink()
    files = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.py"))]
    modules = [".".join(file.with_suffix("").parts) for file in files if file.name != "__init__.py"]
    missing = set().union(*INSTALLED.values()) - INSTALLED[role]
    absent = [IMPORTED.get(name, name) for name in missing] + [other for other in ROLES if other != role] + ["client"]
    cuda = () if find_spec("triton") else ("triton", "triton.language")  # comes with CUDA builds of torch
    program = (
        "import importlib, sys\n"
        "from unittest.mock import MagicMock\n"
        f"sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"
        f"sys.modules.update({{name: MagicMock() for name in {cuda!r}}})\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import wire\n"
        f"assert wire.__file__.startswith({str(tmp_path)!r})\n"
    )
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("role", ROLES)
def test_an_image_runs_as_nobody_in_particular(role: str) -> None:
    lines = containerfile(role)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert len(users) == 1
    assert int(users[0].split(":")[0]) > 10_000
    assert lines.index(f"USER {users[0]}") > max(i for i, line in enumerate(lines) if line.startswith("RUN "))
    base = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert len(base) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base[0])
    assert all("--no-cache-dir --constraint" in part for line in lines for part in line.split("pip install")[1:])


def test_the_workers_are_locked_down() -> None:
    assert set(services()) == {"trusted-worker", "gpu-worker"}
    for service in services().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["ulimits"]["core"] == 0
        assert service["mem_limit"]
        assert all("nosuid,nodev" in mount for mount in service["tmpfs"])
        assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & service.keys()
        model = [volume for volume in service["volumes"] if volume["type"] == "bind"]
        assert [(volume["source"], volume["target"]) for volume in model] == [("../../models/demo", "/models/demo")]
        assert model[0]["read_only"] is True


def test_the_gpu_worker_has_no_network_and_clients_come_from_this_machine() -> None:
    trusted, gpu = services()["trusted-worker"], services()["gpu-worker"]
    assert gpu["network_mode"] == "none"
    assert "ports" not in gpu
    assert all(port.startswith("127.0.0.1:") for port in trusted["ports"])


def test_the_settings_fit() -> None:
    trusted, gpu = resolved("trusted_worker"), resolved("gpu_worker")
    service = services()["trusted-worker"]
    assert trusted["gpu-worker"] == gpu["listen"] == "unix:/run/cleave/gpu.sock"
    assert trusted["model"] == "/models/demo"
    assert gpu["model"] == ["/models/demo"]
    assert trusted["listen"].rpartition(":")[2] == service["ports"][0].rpartition(":")[2]
    assert trusted["memory-budget"] <= service["ulimits"]["memlock"] <= GIB
    limit = size(service["mem_limit"].replace("m", "MiB"))
    scratch = re.search(r"size=(\d+)m", service["tmpfs"][0])
    assert scratch
    assert trusted["pad-bank"] < int(scratch[1]) << 20
    assert trusted["memory-budget"] + (int(scratch[1]) << 20) + PROCESS <= limit
    assert service["memswap_limit"] == service["mem_limit"]
    for name, settings in (("trusted-worker", trusted), ("gpu-worker", gpu)):
        assert int(services()[name]["stop_grace_period"].rstrip("s")) >= settings["drain-seconds"] + 10
        assert services()[name]["image"].endswith(
            ":" + tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        )


def test_they_meet_at_the_socket() -> None:
    """The folder and the socket are the GPU worker's and its group's, and the trusted worker is in that group."""
    user = next(line.split()[1] for line in containerfile("gpu_worker") if line.startswith("USER "))
    uid, gid = user.split(":")
    volume = yaml.safe_load((FOLDER / "compose.yaml").read_text())["volumes"]["socket"]["driver_opts"]["o"]
    assert {f"uid={uid}", f"gid={gid}", "mode=0750"} <= set(volume.split(","))
    assert services()["trusted-worker"]["group_add"] == [gid]
    assert any("umask 0007" in line for line in containerfile("gpu_worker") if line.startswith("ENTRYPOINT"))


@contextmanager
def health_server(address: str, status: health_pb2.HealthCheckResponse.ServingStatus) -> Iterator[None]:
    servicer = health.HealthServicer()
    servicer.set("", status)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("role", ROLES)
def test_the_health_check_tells_serving_from_not(role: str, tmp_path: Path) -> None:
    line = next(line for line in containerfile(role) if line.startswith("HEALTHCHECK"))
    command = yaml.safe_load(line.partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"]
    inside = "unix:/run/cleave/gpu.sock" if role == "gpu_worker" else "127.0.0.1:7750"
    assert command[2].count(inside) == 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outside = f"unix:{tmp_path}/gpu.sock" if role == "gpu_worker" else f"127.0.0.1:{port}"
    program = [sys.executable, "-c", command[2].replace(inside, outside)]

    def check() -> int:
        return subprocess.run(program, capture_output=True, check=False, timeout=30).returncode

    assert check() == 1
    for status, expected in (
        (health_pb2.HealthCheckResponse.SERVING, 0),
        (health_pb2.HealthCheckResponse.NOT_SERVING, 1),
    ):
        with health_server(outside, status):
            assert check() == expected
