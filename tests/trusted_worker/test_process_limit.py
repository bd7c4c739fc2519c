"""The bound on the whole process: control groups in a folder that acts as the kernel's, RLIMIT_DATA for real."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trusted_worker import process_limit
from trusted_worker.engine import Engine
from trusted_worker.process_limit import ALLOWANCE, LEAST, ProcessLimit, enforce
from wire.errors import ExhaustedError

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BUDGET = 64 * MIB
TAKEN, RESIDENT = 60 * MIB, 50 * MIB
DEFAULT = TAKEN + BUDGET + ALLOWANCE
PID = str(os.getpid())
DATA = ProcessLimit("rlimit-data", DEFAULT)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups and RLIMIT_DATA are Linux's")


class Kernel:
    """/proc/self and a tree of control groups with the unit's group `system/unit`, in which this process is."""

    def __init__(self, folder: Path) -> None:
        self.groups, self.process = folder / "groups", folder / "proc"
        self.unit = self.groups / "system" / "unit"
        self.unit.mkdir(parents=True)
        self.process.mkdir()
        for group in (self.groups, self.unit.parent, self.unit):
            self.furnish(group)
        (self.unit / "cgroup.procs").write_text(f"{PID}\n")
        (self.process / "cgroup").write_text("1:name=systemd:/system/unit\n0::/system/unit\n")
        (self.process / "status").write_text(f"Name:\tx\nVmData:\t{TAKEN >> 10} kB\nVmRSS:\t{RESIDENT >> 10} kB\n")
        self.mount("ext4")

    def mount(self, kind: str) -> None:
        """The temporary folder, and everything below, is of that kind."""
        device = os.stat(self.groups).st_dev
        line = f"36 35 {os.major(device)}:{os.minor(device)} / / rw shared:1 - {kind} none rw\n"
        (self.process / "mountinfo").write_text(f"35 1 0:9999 / /proc rw - proc proc rw\n{line}")

    def furnish(self, group: Path) -> None:
        """What a group has at once; memory.max comes when the group above hands the controller on."""
        for name in ("cgroup.procs", "cgroup.subtree_control"):
            (group / name).touch()

    @property
    def own(self) -> Path:
        return self.unit / f"cleave-{PID}"

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        self.furnish(path)

    def rmdir(self, path: Path) -> None:
        if (path / "cgroup.procs").read_text():
            raise OSError(errno.EBUSY, "somebody is in it")
        for file in path.iterdir():
            file.unlink()
        os.rmdir(path)

    def write(self, path: Path, text: str) -> None:
        """Moves processes, refuses to hand controllers on past them, and makes the files that follow from it."""
        if path.name == "cgroup.procs":
            if (path.parent / "cgroup.subtree_control").read_text():
                raise OSError(errno.EBUSY, "it has handed controllers on")
            for other in self.groups.rglob("cgroup.procs"):
                other.write_text("".join(f"{pid}\n" for pid in other.read_text().split() if pid != text))
            text = f"{path.read_text()}{text}\n"
        elif path.name == "cgroup.subtree_control":
            if (path.parent / "cgroup.procs").read_text():
                raise OSError(errno.EBUSY, "somebody is in it")
            for child in filter(Path.is_dir, path.parent.iterdir()):
                (child / "memory.max").write_text("max\n")
                (child / "memory.swap.max").write_text("max\n")
        elif not path.exists():
            raise OSError(errno.ENOENT, "no such file")
        path.write_text(text)

    def enforce(self, asked: int | None = None) -> ProcessLimit:
        return enforce(BUDGET, asked, str(self.groups), self.groups, self.process)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Groups are written to as in the kernel; RLIMIT_DATA of this process stays as it is."""
    kernel = Kernel(tmp_path)

    def mkdir(path: Path) -> None:
        kernel.mkdir(path)

    def rmdir(path: Path) -> None:
        kernel.rmdir(path)

    monkeypatch.setattr(process_limit, "_write", kernel.write)
    monkeypatch.setattr(process_limit, "_limit_data", lambda limit: ProcessLimit("rlimit-data", limit))
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    return kernel


def test_a_delegated_group_gets_a_limited_one_below_it(kernel: Kernel) -> None:
    assert kernel.enforce() == ProcessLimit("cgroup", DEFAULT)
    assert (kernel.own / "memory.max").read_text() == str(DEFAULT)
    assert (kernel.own / "memory.swap.max").read_text() == "0"
    assert (kernel.own / "cgroup.procs").read_text().split() == [PID]
    assert (kernel.unit / "cgroup.procs").read_text() == ""


def test_a_limit_that_is_asked_for_is_the_one_that_is_set(kernel: Kernel) -> None:
    asked = TAKEN + BUDGET + LEAST
    assert kernel.enforce(asked) == ProcessLimit("cgroup", asked)
    assert (kernel.own / "memory.max").read_text() == str(asked)


@pytest.mark.parametrize("where", ["", "system", "system/unit"])
def test_somebody_else_s_limit_is_reported_and_nothing_is_touched(kernel: Kernel, where: str) -> None:
    (kernel.groups / where / "memory.max").write_text(f"{512 * MIB}\n")
    assert kernel.enforce() == ProcessLimit("cgroup", 512 * MIB)
    assert not kernel.own.exists()


def test_of_several_limits_the_smallest_counts_and_a_larger_one_is_not_enough(kernel: Kernel) -> None:
    (kernel.unit.parent / "memory.max").write_text(f"{1 << 40}\n")
    assert kernel.enforce() == ProcessLimit("cgroup", DEFAULT)
    (kernel.own / "memory.max").write_text(f"{300 * MIB}\n")
    (kernel.process / "cgroup").write_text(f"0::/system/unit/{kernel.own.name}\n")
    assert kernel.enforce() == ProcessLimit("cgroup", 300 * MIB)


def test_a_group_that_cannot_hold_the_budget_is_refused(kernel: Kernel) -> None:
    (kernel.unit / "memory.max").write_text(str(BUDGET + RESIDENT - 1))
    with pytest.raises(ExhaustedError, match="MemoryMax"):
        kernel.enforce()
    (kernel.unit / "memory.max").write_text(str(BUDGET + RESIDENT))
    assert kernel.enforce().kind == "cgroup"


@pytest.mark.parametrize("others", [f"{PID}\n77\n", "", "0\n"], ids=["another", "nobody", "unseen"])
def test_a_group_that_is_shared_is_left_alone(kernel: Kernel, others: str) -> None:
    (kernel.unit / "cgroup.procs").write_text(others)
    assert kernel.enforce() == DATA
    assert not kernel.own.exists()


def _refuses(kernel: Kernel, name: str) -> Callable[[Path, str], None]:
    def write(path: Path, text: str) -> None:
        if path.name == name and (name != "cgroup.procs" or path.parent == kernel.own):
            raise PermissionError(errno.EACCES, "not yours")
        kernel.write(path, text)

    return write


@pytest.mark.parametrize("name", ["cgroup.procs", "cgroup.subtree_control", "memory.max"])
def test_a_group_that_is_not_delegated_is_left_as_it_was(
    kernel: Kernel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_limit, "_write", _refuses(kernel, name))
    assert kernel.enforce() == DATA
    assert not kernel.own.exists() or name == "memory.max"
    assert sum(PID in procs.read_text().split() for procs in kernel.groups.rglob("cgroup.procs")) == 1


def test_a_folder_that_cannot_be_written_is_no_group(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EROFS, "read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert kernel.enforce() == DATA


@pytest.mark.parametrize("text", ["4:memory:/system/unit\n", "0::/elsewhere\n", "0::/../system/unit\n", ""])
def test_groups_that_are_not_seen_are_none(kernel: Kernel, text: str) -> None:
    (kernel.process / "cgroup").write_text(text)
    assert kernel.enforce() == DATA


def test_what_is_parked_in_memory_does_not_count_against_us(kernel: Kernel) -> None:
    kernel.mount("tmpfs")
    assert kernel.enforce() == DATA
    assert not kernel.own.exists()


def test_a_limit_below_what_is_needed_is_refused_with_what_would_do(kernel: Kernel) -> None:
    with pytest.raises(ExhaustedError, match=f"at least {(TAKEN + BUDGET + LEAST) // MIB}MiB"):
        kernel.enforce(TAKEN + BUDGET + LEAST - 1)
    assert not kernel.own.exists()


def test_no_limit_is_said_to_be_none(kernel: Kernel) -> None:
    assert kernel.enforce(0) == ProcessLimit("not enforced", 0)
    assert not kernel.own.exists()


HOARD = """
import mmap, sys, tempfile
from pathlib import Path
from trusted_worker.process_limit import enforce
limit = enforce(16 << 20, None, None, Path("/nowhere"))
arena = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
kept = []
try:
    for _ in range(4096):
        kept.append(bytearray(1 << 20))
except MemoryError:
    held = len(kept)
    kept.clear()
    print(limit.kind, limit.bytes, held)
"""


def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_process_that_takes_more_than_its_limit_gets_a_memory_error() -> None:
    done = run(HOARD)
    assert done.returncode == 0, done.stderr
    kind, limit, held = done.stdout.split()
    assert kind == "rlimit-data"
    assert ALLOWANCE // MIB - 64 < int(held) < ALLOWANCE // MIB
    assert int(limit) > ALLOWANCE + (16 << 20)


def test_a_limit_that_the_kernel_does_not_mean_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.setrlimit", lambda kind, limits: None)
    assert enforce(BUDGET, None, None, Path("/nowhere")) == ProcessLimit("not enforced", 0)


def test_a_limit_that_stands_already_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, 300 << 20))\n"
        "from pathlib import Path; from trusted_worker.process_limit import enforce\n"
        "print(enforce(1 << 20, None, None, Path('/nowhere')))"
    )
    assert run(program).stdout == f"ProcessLimit(kind='rlimit-data', bytes={300 << 20})\n"


@pytest.mark.parametrize("where", ["serving.run", "process_limit.enforce"])
def test_a_start_without_enough_memory_ends_with_one_line(where: str, tmp_path: Path) -> None:
    program = (
        "import sys, numpy\n"
        "from trusted_worker import __main__, process_limit, serving\n"
        "def fail(*arguments): numpy.ones(1 << 48)\n"
        f"{where} = fail\n"
        "__main__.main()"
    )
    done = run(program, "--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("raise --process-memory")
    assert "Traceback" not in done.stderr


class Greedy:
    """A scheme that asks for more than there is."""

    def forward(self, *_: object) -> None:
        """Never called."""

    def idle(self) -> bool:
        return bool(bytearray(1 << 62))

    def distrust(self) -> None:
        """Nothing to renew."""


def test_an_allocation_that_fails_in_the_compute_thread_is_an_error_and_no_more() -> None:
    engine = Engine(Greedy, 4)
    engine.start()
    try:
        with pytest.raises(MemoryError):
            engine.submit(lambda: bytearray(1 << 62)).result(30)
        assert engine.submit(lambda: 7).result(30) == 7
    finally:
        engine.stop()
        engine.join(30)
    assert not engine.is_alive()
