"""A GPU worker and a trusted worker on this machine, as children of this process.

The workers talk over a Unix socket in a private folder. Start the cluster in the main thread: the kernel ends the
children when the thread that made them ends, so nothing is left behind even when this process is killed.
"""

import contextlib
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from deploy.local.child import Child, Progress
from wire.errors import UnavailableError

LISTEN_SECONDS = 120.0  # importing torch from a cold disk takes long
SERVE_SECONDS = 1800.0  # loading a model: its size and the disk decide
GPU_WORKER, TRUSTED_WORKER = "GPU worker", "trusted worker"  # roles
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


class Cluster:
    """Both workers, ready when the `with` block begins and gone when it ends. `target` is where to connect."""

    def __init__(self, settings: Settings, progress: Progress, log: TextIO | None = None) -> None:
        self.target = ""
        self._offload = ""  # where the GPU worker listens
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
        """The workers' processes by role: TRUSTED_WORKER, and GPU_WORKER where there is one."""
        return {child.name: child.pid for child in self._children}

    def restart_gpu_worker(self) -> None:
        """Kill the GPU worker, if it still runs, and start another one in its place. In the main thread only."""
        old = next(child for child in self._children if child.name == GPU_WORKER)
        old.kill()
        old.reap()
        self._children.remove(old)
        self._ended.clear()
        self._start_gpu_worker(self._offload)

    def _start(self) -> None:
        folder = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="cleave-"))  # mode 0700
        if self._settings.offloads:
            self._offload = self._start_gpu_worker(self._settings.gpu_listen or f"unix:{folder}/gpu.sock")
        listen = self._settings.listen or f"unix:{folder}/trusted.sock"
        trusted = self._spawn(TRUSTED_WORKER, self._trusted_worker(listen, self._offload))
        self.target = trusted.await_line("listening on", LISTEN_SECONDS, "starting the trusted worker", self._tick)
        trusted.await_line("serving", SERVE_SECONDS, "loading the model", self._tick)

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
        return [*argv, "--device", settings.device, "--ops", settings.ops]

    def _trusted_worker(self, listen: str, offload: str) -> list[str]:
        settings = self._settings
        argv = ["-m", "trusted_worker", "--listen", listen, "--gpu-worker", offload]
        argv += ["--model", str(settings.model.resolve()), "--scheme", settings.scheme]
        argv += ["--precision", settings.precision]
        argv += ["--memory-budget", settings.memory_budget] if settings.memory_budget else []
        argv += ["--pad-bank", settings.pad_bank, "--prefill", "auto", "--drain-seconds", "1", *settings.more]
        return [*argv, "--insecure-plaintext"] if settings.insecure_plaintext else argv

    def _stop(self) -> None:
        for child in reversed(self._children):
            child.terminate()
        for child in reversed(self._children):
            child.reap()
        self._children.clear()
        self._cleanup.close()
