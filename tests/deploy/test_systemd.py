"""The units: systemd finds nothing wrong with them, they are locked down, and they fit the settings beside them."""

import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from trusted_worker.config import size

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy" / "systemd"
ROLES = ("trusted", "gpu")
MOST_EXPOSURE_AS_ROOT = 2.5
MOST_EXPOSURE = 2.0
PATIENCE = 60.0
PROCESS = 256 << 20  # interpreter, libraries and buffers
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def unit(role: str) -> dict[str, list[str]]:
    """Every setting of a unit, in order."""
    settings = defaultdict(list)
    for line in (UNITS / f"cleave-{role}-worker.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            settings[key].append(value)
    return settings


def settings(role: str) -> dict[str, object]:
    """What the worker makes of the example file."""
    command = [sys.executable, "-m", f"{role}_worker", "--config", str(UNITS / f"{role}-worker.toml"), "--print-config"]
    printed = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    return tomllib.loads(printed.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units with commands that exist here; systemd looks for them."""
    folder = tmp_path_factory.mktemp("units")
    commands = Path(sys.executable).parent
    for role in ROLES:
        text = (UNITS / f"cleave-{role}-worker.service").read_text()
        (folder / f"cleave-{role}-worker.service").write_text(text.replace("/opt/cleave/bin", str(commands)))
    return folder


def analyze(*arguments: str) -> str:
    """What systemd-analyze prints. It must succeed."""
    command = ["systemd-analyze", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def exposure(path: Path) -> float:
    """The overall number of systemd-analyze security, from 0 (locked down) to 10."""
    text = analyze("security", "--offline=true", "--no-pager", str(path))
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", text)
    assert found, text
    return float(found[1])


@needs_systemd
def test_systemd_finds_nothing_wrong(installed: Path) -> None:
    assert analyze("verify", "--man=no", *map(str, sorted(installed.glob("*.service")))) == ""


@needs_systemd
@pytest.mark.parametrize("role", ROLES)
def test_exposure_is_low(role: str, installed: Path) -> None:
    assert exposure(installed / f"cleave-{role}-worker.service") <= MOST_EXPOSURE


@needs_systemd
def test_exposure_is_low_with_a_cuda_device(installed: Path, tmp_path: Path) -> None:
    name = "cleave-gpu-worker.service"
    dropped = (UNITS / "cleave-gpu-worker-cuda.conf").read_text().partition("[Service]\n")[2]
    (tmp_path / name).write_text(
        (installed / name).read_text().replace("\n[Install]", f"\n[Service]\n{dropped}\n[Install]")
    )
    assert analyze("verify", "--man=no", str(tmp_path / name)) == ""
    assert exposure(tmp_path / name) <= MOST_EXPOSURE


@needs_systemd
def test_exposure_is_low_with_evidence_of_the_kernel(installed: Path, tmp_path: Path) -> None:
    name = "cleave-trusted-worker.service"
    dropped = (UNITS / "cleave-trusted-worker-tsm.conf").read_text().partition("[Service]\n")[2]
    (tmp_path / name).write_text(
        (installed / name).read_text().replace("\n[Install]", f"\n[Service]\n{dropped}\n[Install]")
    )
    assert analyze("verify", "--man=no", str(tmp_path / name)) == ""
    assert exposure(tmp_path / name) <= MOST_EXPOSURE_AS_ROOT


@pytest.mark.parametrize("role", ROLES)
def test_every_line_of_an_example_is_a_setting(role: str) -> None:
    text = (UNITS / f"{role}-worker.toml").read_text()
    printed = settings(role)
    for key, value in tomllib.loads(text).items():
        expected = size(value) if key in ("memory-budget", "pad-bank") else value
        assert printed[key] == expected, key
    optional = re.findall(r"^# ([a-z-]+ = .*)$", text, re.MULTILINE)
    assert {"tls-certificate", "tls-key", "tls-authority"} <= tomllib.loads("\n".join(optional)).keys()


def test_the_examples_and_the_units_fit() -> None:
    for role in ROLES:
        assert unit(role)["ExecStart"] == [
            f"/opt/cleave/bin/cleave-{role}-worker --config /etc/cleave/{role}-worker.toml"
        ]
        drain = settings(role)["drain-seconds"]
        assert isinstance(drain, float)
        assert float(unit(role)["TimeoutStopSec"][0]) >= drain + 10
    trusted, gpu = settings("trusted"), settings("gpu")
    assert trusted["gpu-worker"] == gpu["listen"] == f"unix:/run/{unit('gpu')['RuntimeDirectory'][0]}/gpu.sock"
    assert [trusted["model"]] == gpu["model"]
    assert trusted["spill-dir"] == f"/var/cache/{unit('trusted')['CacheDirectory'][0]}"
    assert unit("gpu")["Environment"] == [f"NUMBA_CACHE_DIR=/var/cache/{unit('gpu')['CacheDirectory'][0]}"]
    budget = trusted["memory-budget"]
    assert isinstance(budget, int)
    assert size(unit("trusted")["LimitMEMLOCK"][0].replace("G", "GiB")) >= budget
    assert size(unit("trusted")["MemoryMax"][0].replace("M", "MiB")) >= budget + PROCESS


def test_the_users_are_made_and_meet_at_the_socket() -> None:
    lines = [line.split() for line in (UNITS / "cleave.conf").read_text().splitlines() if not line.startswith("#")]
    users = {line[1] for line in lines if line[0] == "u"}
    assert users == {unit(role)["User"][0] for role in ROLES} == {"cleave-trusted", "cleave-gpu"}
    assert [line[1:] for line in lines if line[0] == "m"] == [["cleave-trusted", "cleave-gpu"]]
    assert unit("gpu")["UMask"] == ["0007"]
    assert unit("trusted")["UMask"] == ["0077"]


MDWE = """
import ctypes, runpy, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) != 0:  # PR_SET_MDWE
    sys.exit(77)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_the_trusted_worker_makes_no_code(tmp_path: Path) -> None:
    """MemoryDenyWriteExecute=yes, with the kernel's own means: it loads a model and answers."""
    listen = f"unix:{tmp_path}/trusted.sock"
    model = ["--model", str(ROOT / "models" / "demo")]
    command = [sys.executable, "-c", MDWE, "trusted_worker", *model, "--scheme", "tee-only", "--listen", listen]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={}) as worker:
        stop = threading.Timer(PATIENCE, worker.kill)
        stop.start()
        try:
            assert worker.stdout
            if worker.stdout.readline() == "" and worker.wait() == 77:
                pytest.skip("the kernel has no PR_SET_MDWE")
            assert worker.stdout.readline() == "serving\n"
            chat = [sys.executable, "-m", "client", "chat", "--connect", listen, *model]
            chat += ["--scheme", "tee-only", "--prompt", "Hello", "--max-new-tokens", "4"]
            done = subprocess.run(chat, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
            assert done.returncode == 0, done.stderr
        finally:
            stop.cancel()
            worker.terminate()
