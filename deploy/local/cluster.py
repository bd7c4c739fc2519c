"""A GPU worker and a trusted worker on this machine, as children of this process; a simulated TEE, if it is wanted.

The workers talk over a Unix socket in a private folder. The simulated TEE makes its keys while the model loads;
the policy file that names them is what a client of this cluster needs. Start the cluster in the main thread: the
kernel ends the children when the thread that made them ends, so nothing is left behind even when this process is
killed.
"""

import contextlib
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from deploy.local import simulated_policy
from deploy.local.child import Child, Progress
from wire.errors import UnavailableError

LISTEN_SECONDS = 120.0  # importing torch from a cold disk takes long
SERVE_SECONDS = 1800.0  # loading a model: its size and the disk decide
KEYS_SECONDS = 120.0  # finding the primes of two RSA keys: about a second, but nothing bounds it
GPU_WORKER, TRUSTED_WORKER, SIMULATED_TEE = "GPU worker", "trusted worker", "simulated TEE"  # roles
ROOT = Path(__file__).resolve().parents[2]  # the children run the packages beside this one


@dataclass(frozen=True)
class Settings:
    """What the cluster runs. Sizes are spelled as the trusted worker's command line spells them."""

    model: Path
    scheme: str
    precision: str
    memory_budget: str | None = None  # None: the trusted worker's default, or what its --tee-profile says
    pad_bank: str = "64MiB"
    device: str = "auto"
    listen: str | None = None  # host:port; None: a Unix socket in the private folder
    gpu_listen: str | None = None  # of the GPU worker; None: a Unix socket in the private folder
    insecure_plaintext: bool = False  # `listen` may be reachable from other machines
    simulated: bool = False  # evidence comes from a simulated TEE; else there is none
    policy_file: Path | None = None  # where the policy for it is written; None: into the private folder
    record: Path | None = None  # where the GPU worker writes all that it sees
    record_keep: int | None = None  # of that the last segments only; None: all
    more: tuple[str, ...] = ()  # further words of the trusted worker's command line

    @property
    def offloads(self) -> bool:
        """Whether there is anything for a GPU worker to do."""
        return self.scheme != "tee-only"

    @property
    def ops(self) -> str:
        """The smallest set of operations that the GPU worker has to offer."""
        whole = self.scheme in ("plain", "kv-shield") or (self.scheme == "split" and self.precision == "float32")
        return "all" if whole else "ring"

    @property
    def insecure(self) -> list[str]:
        """The --insecure- switches that the trusted worker will claim."""
        switches = {word.partition("=")[0] for word in self.more if word.startswith("--insecure-")}
        return sorted(switches | ({"--insecure-plaintext"} if self.insecure_plaintext else set()))


class Cluster:
    """Both workers, ready when the `with` block begins and gone when it ends.

    `target` is where to connect. `policy` is the policy file under which to do so; None without a simulated TEE.
    """

    def __init__(self, settings: Settings, progress: Progress, log: TextIO | None = None) -> None:
        self.target = ""
        self.policy: Path | None = None
        self.gpu_worker = ""  # where it listens, if there is one
        self._settings = settings
        self._progress = progress
        self._log = log
        self._children: list[Child] = []
        self._cleanup = contextlib.ExitStack()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as failed:
            failed.callback(self._stop)
            self._start()
            failed.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def wait(self) -> None:
        """Block until a worker ends by itself, which it should not. Raises UnavailableError with its last words."""
        self._ended.wait()
        self.check()

    def check(self) -> None:
        """Raises UnavailableError when a worker has ended."""
        for child in self._children:
            if not child.running:
                raise UnavailableError(child.epitaph())

    @property
    def pids(self) -> dict[str, int]:
        """Processes by role: TRUSTED_WORKER, and GPU_WORKER and SIMULATED_TEE where there is one."""
        return {child.name: child.pid for child in self._children}

    def restart_gpu_worker(self) -> None:
        """Kill the GPU worker, if it still runs, and start another one in its place. In the main thread only."""
        old = next(child for child in self._children if child.name == GPU_WORKER)
        old.kill()
        old.reap()
        self._children.remove(old)
        self._ended.clear()
        self._start_gpu_worker(self.gpu_worker)

    def _start(self) -> None:
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="cleave-")))  # mode 0700
        policy = self._settings.policy_file or folder / "policy.toml"
        tee = self._start_simulated_tee(folder / "tsm", policy) if self._settings.simulated else None
        if self._settings.offloads:
            self.gpu_worker = self._start_gpu_worker(self._settings.gpu_listen or f"unix:{folder}/gpu.sock")
        listen = self._settings.listen or f"unix:{folder}/trusted.sock"
        argv = self._trusted_worker(listen, self.gpu_worker)
        if tee:
            tee.await_line("listening", LISTEN_SECONDS, "starting the simulated TEE", self._tick)
            argv += ["--evidence", "tsm", "--tsm-dir", str(folder / "tsm")]
        trusted = self._spawn(TRUSTED_WORKER, argv)
        self.target = trusted.await_line("listening on", LISTEN_SECONDS, "starting the trusted worker", self._tick)
        trusted.await_line("serving", SERVE_SECONDS, "loading the model", self._tick)
        self.policy = self._write_policy(tee, policy) if tee else None

    def _start_simulated_tee(self, folder: Path, policy: Path) -> Child:
        simulated_policy.check(policy)  # before anything takes long
        folder.mkdir(0o700)
        return self._spawn(SIMULATED_TEE, ["-m", "deploy.local.simulated_tee", "--folder", str(folder)])

    def _write_policy(self, tee: Child, path: Path) -> Path:
        ready = tee.await_line("ready", KEYS_SECONDS, "making the keys of the simulated TEE", self._tick)
        root, measurement = ready.split()
        policy = simulated_policy.text(root, measurement, self._settings.scheme, self._settings.insecure)
        simulated_policy.write(path, policy)
        return path.absolute()

    def _start_gpu_worker(self, listen: str) -> str:
        gpu = self._spawn(GPU_WORKER, self._gpu_worker(listen))
        return gpu.await_line("listening on", LISTEN_SECONDS, "starting the GPU worker", self._tick)

    def _tick(self, stage: str, seconds: float) -> None:
        self.check()
        self._progress(stage, seconds)

    def _spawn(self, name: str, argv: list[str]) -> Child:
        child = Child(name, argv, ROOT, self._log, self._ended.set)
        self._children.append(child)
        return child

    def _gpu_worker(self, listen: str) -> list[str]:
        settings = self._settings
        argv = ["-m", "gpu_worker", "--listen", listen, "--model", str(settings.model.resolve())]
        argv += ["--record", str(settings.record)] if settings.record else []
        argv += ["--record-keep", str(settings.record_keep)] if settings.record and settings.record_keep else []
        return [*argv, "--device", settings.device, "--ops", settings.ops]

    def _trusted_worker(self, listen: str, offload: str) -> list[str]:
        settings = self._settings
        argv = ["-m", "trusted_worker", "--listen", listen, "--gpu-worker", offload]
        argv += ["--model", str(settings.model.resolve()), "--scheme", settings.scheme]
        argv += ["--precision", settings.precision]
        argv += ["--memory-budget", settings.memory_budget] if settings.memory_budget else []
        argv += ["--pad-bank", settings.pad_bank, "--prefill", "auto", "--drain-seconds", "1"]
        argv += ["--connect-seconds", str(LISTEN_SECONDS), *settings.more]
        return [*argv, "--insecure-plaintext"] if settings.insecure_plaintext else argv

    def _stop(self) -> None:
        for child in reversed(self._children):
            child.terminate()
        for child in reversed(self._children):
            child.reap()
        self._children.clear()
        self._cleanup.close()
