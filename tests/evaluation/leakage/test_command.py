"""cleave-leakage --quick as the build runs it: every scheme in real processes, every attack, the gate."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evaluation.leakage import table
from evaluation.leakage.cells import CHANCE, NOT_RUN
from evaluation.leakage.report import best

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "evaluation.leakage"]


def leakage(*flags: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *flags], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where its transcripts are left."""
    return tmp_path_factory.mktemp("leakage")


@pytest.fixture(scope="module")
def result(kept: Path) -> dict[str, Any]:
    """What it printed; its status was 0."""
    flags = ("--quick", "--json", "--transcripts", str(kept / "transcripts"))
    done = leakage(*flags, "--plot", str(kept / "matrix.png"), "--markdown", str(kept / "report.md"), seconds=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_gate_is_passed(result: dict[str, Any]) -> None:
    assert result["gate"]["failures"] == []
    assert {cell["scheme"] for cell in result["cells"]} >= {"plain", "split", "kv-shield", "tee-only", "secure-infer"}


def test_the_protected_scheme_is_at_chance_wherever_it_is_attacked(result: dict[str, Any]) -> None:
    mine = [cell for cell in result["cells"] if cell["scheme"] == table.PROTECTED]
    judged = [cell for cell in mine if cell["attack"] not in table.BY_DESIGN]
    assert {cell["verdict"] for cell in judged} <= {CHANCE, NOT_RUN}
    everywhere = {entry.name for entry in table.ATTACKS if entry.everywhere and not entry.by_design}
    assert {cell["attack"] for cell in judged if cell["verdict"] == CHANCE} >= everywhere


def test_every_attack_broke_the_control(result: dict[str, Any]) -> None:
    for entry in table.ATTACKS:
        found = best(result, table.CONTROL, entry.name)
        assert found is not None
        assert found["estimate"] >= 0.95, entry.name


def test_the_report_and_the_picture_are_written(result: dict[str, Any], kept: Path) -> None:
    text = (kept / "report.md").read_text()
    assert text.startswith("# What the GPU worker learns")
    assert "![The matrix as a picture](matrix.png)" in text
    assert (kept / "matrix.png").stat().st_size > 10_000


def test_flags_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for flags, said in (
        (("--seed", "-1"), "--seed must not be negative"),
        (("--quick", "--plot", str(tmp_path / "x.jpg")), "must be a .png file"),
        (("--quick", "--model", str(tmp_path)), "config.json"),
    ):
        done = leakage(*flags)
        assert done.returncode in (1, 2)
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_report_that_could_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    done = leakage("--quick", "--markdown", str(tmp_path / "nowhere" / "report.md"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"cleave-leakage: {tmp_path}/nowhere/report.md must be a file in a folder that is there"
    ]


def test_an_interrupt_stops_recordings_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [*COMMAND, "--quick"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        while len(list(tmp_path.glob("cleave-*/gpu.sock"))) < 1:
            assert running.poll() is None, "it ended by itself"
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        assert running.stderr
        rest = running.stderr.read()
        assert running.wait(60) == 130
    assert rest.splitlines()[-1] == "cleave-leakage: interrupted"
    assert list(tmp_path.iterdir()) == []
