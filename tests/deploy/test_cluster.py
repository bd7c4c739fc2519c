"""The cluster, with fake workers: small modules in a folder that stands in for the repository."""

import os
import select
import signal
import subprocess
import sys
from dataclasses import replace as replace_settings
from pathlib import Path
from typing import Any

import pytest

from client.attestation import policy_file
from deploy.local import child, cluster
from deploy.local.cluster import Cluster, Settings
from wire.errors import DeadlineError, InvalidArgumentError, UnavailableError

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 20.0

# A worker: says what it was told and who it is, listens, serves, and waits for the end.
WORKER = """
import os, signal, sys
from wire.lifetime import die_with_parent
die_with_parent(int(sys.argv[sys.argv.index("--parent") + 1]))
print(os.getpid(), *sys.argv[1:], file=sys.stderr, flush=True)
listen = sys.argv[sys.argv.index("--listen") + 1]
print("listening on", listen, flush=True)
print("serving", flush=True)
signal.pause()
"""

TEE = f"""
import os, signal, sys
folder = sys.argv[sys.argv.index("--folder") + 1]
assert os.stat(folder).st_mode & 0o777 == 0o700 and not os.listdir(folder)
print("listening", flush=True)
print("ready", "{"ab" * 32}", "{"cd" * 48}", flush=True)
signal.pause()
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two fake workers, and a simulated TEE that needs no time for its keys."""
    for name in ("gpu_worker", "trusted_worker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        replace(tmp_path, name, WORKER)
    (tmp_path / "deploy" / "local").mkdir(parents=True)
    for package in ("deploy", "deploy/local"):
        (tmp_path / package / "__init__.py").touch()
    replace_tee(tmp_path, TEE)
    monkeypatch.setattr(cluster, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


def replace(repository: Path, name: str, program: str) -> None:
    (repository / name / "__main__.py").write_text(program)


def replace_tee(repository: Path, program: str) -> None:
    (repository / "deploy" / "local" / "simulated_tee.py").write_text(program)


class Recorder:
    """Progress and log of a cluster."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def __call__(self, stage: str, seconds: float) -> None:
        if stage not in self.stages:
            self.stages.append(stage)


def settings(scheme: str = "secure-infer", precision: str = "int8") -> Settings:
    return Settings(Path("models/demo"), scheme, precision)


def test_both_workers_run_and_stop(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    progress = Recorder()
    with Cluster(settings(), progress, log=sys.stderr) as running:
        running.check()
        socket = running.target.removeprefix("unix:")
        folder = Path(socket).parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    assert progress.stages == ["starting the GPU worker", "starting the trusted worker", "loading the model"]
    gpu, trusted = (line.split(maxsplit=1) for line in capfd.readouterr().err.splitlines())
    assert "--ops ring" in gpu[1]
    assert f"--gpu-worker unix:{folder}/gpu.sock" in trusted[1]
    for process in (gpu[0], trusted[0]):
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_a_killed_gpu_worker_can_be_started_again(repository: Path) -> None:
    chosen = replace_settings(settings(), gpu_listen=f"unix:{repository}/gpu")
    with Cluster(chosen, Recorder()) as running:
        before = running.pids
        assert set(before) == {cluster.GPU_WORKER, cluster.TRUSTED_WORKER}
        os.kill(before[cluster.GPU_WORKER], signal.SIGKILL)
        running.restart_gpu_worker()
        running.check()
        after = running.pids
        assert after[cluster.TRUSTED_WORKER] == before[cluster.TRUSTED_WORKER]
        assert after[cluster.GPU_WORKER] != before[cluster.GPU_WORKER]
        line = Path(f"/proc/{after[cluster.GPU_WORKER]}/cmdline").read_text().split("\0")
        assert line[line.index("--listen") + 1] == f"unix:{repository}/gpu"
    for process in after.values():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_restart_replaces_a_gpu_worker_that_runs_and_notices_the_other_s_end(repository: Path) -> None:
    with Cluster(settings(), Recorder()) as running:
        before = running.pids
        running.restart_gpu_worker()
        with pytest.raises(ProcessLookupError):
            os.kill(before[cluster.GPU_WORKER], 0)
        os.kill(before[cluster.TRUSTED_WORKER], signal.SIGKILL)
        with pytest.raises(UnavailableError, match="trusted worker stopped"):
            running.wait()
        with pytest.raises(UnavailableError, match="trusted worker stopped"):
            running.restart_gpu_worker()


@pytest.mark.parametrize(
    ("budget", "more", "said"),
    [(None, ("--tee-profile", "optee"), "--tee-profile optee"), ("14MiB", (), "--memory-budget 14MiB")],
)
def test_the_budget_is_a_number_or_left_to_a_profile(
    repository: Path, budget: str | None, more: tuple[str, ...], said: str
) -> None:
    with Cluster(replace_settings(settings("tee-only"), memory_budget=budget, more=more), Recorder()) as running:
        line = Path(f"/proc/{running.pids[cluster.TRUSTED_WORKER]}/cmdline").read_text().replace("\0", " ")
    assert said in line
    assert line.count("--memory-budget") + line.count("--tee-profile") == 1


def simulated(**changes: Any) -> Settings:
    return replace_settings(settings(), simulated=True, **changes)


def test_a_simulated_tee_starts_first_and_its_policy_is_written(repository: Path) -> None:
    progress = Recorder()
    with Cluster(simulated(), progress) as running:
        assert list(running.pids) == [cluster.SIMULATED_TEE, cluster.GPU_WORKER, cluster.TRUSTED_WORKER]
        assert running.policy is not None
        folder = running.policy.parent
        assert folder == Path(running.target.removeprefix("unix:")).parent
        assert running.policy.stat().st_mode & 0o777 == 0o600
        rules = policy_file.load(running.policy)
        line = Path(f"/proc/{running.pids[cluster.TRUSTED_WORKER]}/cmdline").read_text().replace("\0", " ")
        processes = list(running.pids.values())
    assert rules.simulated is not None
    assert rules.simulated.dev_root_sha256 == "ab" * 32
    assert rules.simulated.measurements.values == {"cd" * 48}
    assert rules.claims.schemes == {"secure-infer"}
    assert not rules.claims.insecure
    assert f"--evidence tsm --tsm-dir {folder}/tsm" in line
    assert progress.stages == [
        "starting the GPU worker", "starting the simulated TEE", "starting the trusted worker", "loading the model",
        "making the keys of the simulated TEE",
    ]  # fmt: skip
    assert not folder.exists()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_without_one_there_is_neither_policy_nor_evidence(repository: Path) -> None:
    with Cluster(settings(), Recorder()) as running:
        assert running.policy is None
        line = Path(f"/proc/{running.pids[cluster.TRUSTED_WORKER]}/cmdline").read_text()
    assert "--evidence" not in line


def test_the_policy_names_the_switches_that_the_worker_will_claim(repository: Path) -> None:
    more = ("--insecure-unchecked-tiles", "--insecure-clear-adapter", "a=b", "--insecure-clear-adapter=c=d")
    with Cluster(simulated(insecure_plaintext=True, more=more), Recorder()) as running:
        assert running.policy is not None
        insecure = policy_file.load(running.policy).claims.insecure
    assert insecure == {"--insecure-plaintext", "--insecure-unchecked-tiles", "--insecure-clear-adapter"}


def test_the_policy_goes_where_it_is_wanted_and_stays(repository: Path) -> None:
    path = repository / "mine.toml"
    with Cluster(simulated(policy_file=path), Recorder()) as running:
        assert running.policy == path
    assert policy_file.load(path).accept == {"simulated"}


def test_a_policy_of_somebody_else_stops_the_start(repository: Path) -> None:
    (repository / "mine.toml").write_text("version = 1\n")
    progress = Recorder()
    for name, reason in (("mine.toml", "name another place"), ("absent/mine.toml", "no such folder")):
        with pytest.raises(InvalidArgumentError, match=reason):
            Cluster(simulated(policy_file=repository / name), progress).__enter__()
    assert not progress.stages


def test_the_death_of_the_simulated_tee_is_reported(repository: Path) -> None:
    with Cluster(simulated(), Recorder()) as running:
        os.kill(running.pids[cluster.SIMULATED_TEE], signal.SIGKILL)
        with pytest.raises(UnavailableError, match="simulated TEE stopped"):
            running.wait()
    replace_tee(repository, "import sys\nsys.exit('no keys today')\n")
    with pytest.raises(UnavailableError, match=r"simulated TEE stopped.*no keys today"):
        Cluster(simulated(), Recorder()).__enter__()


def test_a_gpu_worker_can_be_started_again_beside_one(repository: Path) -> None:
    with Cluster(simulated(), Recorder()) as running:
        before = running.pids
        running.restart_gpu_worker()
        after = running.pids
        running.check()
    assert before[cluster.GPU_WORKER] != after[cluster.GPU_WORKER]
    assert before[cluster.SIMULATED_TEE] == after[cluster.SIMULATED_TEE]


def test_tee_only_has_one_process(repository: Path) -> None:
    with Cluster(settings("tee-only"), Recorder()) as running:
        assert set(running.pids) == {cluster.TRUSTED_WORKER}


@pytest.mark.parametrize(
    ("scheme", "precision", "ops"),
    [
        ("secure-infer", "int8", "ring"),
        ("split", "int8", "ring"),
        ("split", "float32", "all"),
        ("plain", "int8", "all"),
    ],
)
def test_the_gpu_worker_offers_no_more_than_the_scheme_needs(scheme: str, precision: str, ops: str) -> None:
    assert settings(scheme, precision).ops == ops


def test_tee_only_starts_no_gpu_worker(repository: Path) -> None:
    progress = Recorder()
    with Cluster(settings("tee-only"), progress):
        assert "starting the GPU worker" not in progress.stages


def test_a_worker_that_refuses_its_input_is_quoted(repository: Path) -> None:
    replace(repository, "trusted_worker", "import sys\nprint('log', file=sys.stderr)\nsys.exit('no good')\n")
    with pytest.raises(UnavailableError, match=r"trusted worker stopped \(exit status 1\): log / no good"):
        Cluster(settings(), Recorder()).__enter__()
    usage = "import sys\nprint('usage', file=sys.stderr)\nprint('bad', file=sys.stderr)\nsys.exit(2)\n"
    replace(repository, "gpu_worker", usage)
    with pytest.raises(UnavailableError, match=r"GPU worker stopped \(exit status 2\): bad"):
        Cluster(settings(), Recorder()).__enter__()


def test_a_worker_that_dies_later_is_reported(repository: Path) -> None:
    dying = WORKER.replace("signal.pause()", "sys.stdin.read(); sys.exit('out of luck')")
    replace(repository, "gpu_worker", dying)
    with pytest.raises(UnavailableError, match="out of luck"), Cluster(settings(), Recorder()) as running:
        running.wait()


def test_the_death_of_one_worker_ends_the_wait_for_the_other(repository: Path) -> None:
    replace(repository, "gpu_worker", WORKER.replace("signal.pause()", "sys.exit('gone')"))
    replace(repository, "trusted_worker", "import signal\nsignal.pause()\n")
    with pytest.raises(UnavailableError, match="gone"):
        Cluster(settings(), Recorder()).__enter__()


def test_a_worker_that_never_serves_meets_a_deadline(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SERVE_SECONDS", 0.05)
    replace(repository, "trusted_worker", WORKER.replace('print("serving", flush=True)', ""))
    with pytest.raises(DeadlineError, match="loading the model"):
        Cluster(settings(), Recorder()).__enter__()


def test_a_worker_that_ignores_sigterm_is_killed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "STOP_SECONDS", 0.05)
    deaf = WORKER.replace("print(os.getpid()", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid()")
    replace(repository, "trusted_worker", deaf.replace("signal.pause()", "while True: signal.pause()"))
    with Cluster(settings(), Recorder()) as running:
        running.check()


PARENT = """
import pathlib, sys
from deploy.local import cluster
cluster.ROOT = pathlib.Path(sys.argv[1])
settings = cluster.Settings(pathlib.Path("models/demo"), "secure-infer", "int8")
with cluster.Cluster(settings, lambda stage, seconds: None, log=sys.stdout) as running:
    print("ready", flush=True)
    running.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_children_die_with_a_killed_parent(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(repository))  # a killed parent leaves its empty folder behind
    command = [sys.executable, "-c", PARENT, str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as parent:
        try:
            assert parent.stdout
            lines = [parent.stdout.readline().strip() for _ in range(3)]  # the workers' own, and "ready", in any order
        finally:
            parent.kill()
    descriptors = [_pidfd(int(line.split()[0])) for line in lines if line != "ready"]
    assert len(descriptors) == 2
    for descriptor in descriptors:
        if descriptor is not None:
            assert select.select([descriptor], [], [], PATIENCE)[0], "a child outlived its parent"
            os.close(descriptor)


def _pidfd(process: int) -> int | None:
    """Becomes readable when the process ends; None when it has ended."""
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        return None
