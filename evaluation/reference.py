"""A `transformers` row: the library in a process of its own, asked for the same as every cluster (reference_worker.py).

Its batch decodes in lockstep, so all of its sessions have the same gaps. There is no bank, no budget, no exchange.
"""

import importlib.util
import json
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from client.counters import Counters
from deploy.local.child import Child, Progress
from deploy.local.cluster import ROOT
from evaluation.measure import CLIENT, STEP_SECONDS, Load, Sample, prompts_of
from evaluation.processes import cpu_seconds, resident_bytes
from wire.errors import DeadlineError, UnavailableError
from wire.model_config import ModelConfig
from wire.v1 import trusted_worker_pb2 as pb

TRANSFORMERS = "transformers"
LOAD_SECONDS = 900.0
_NOTHING = Counters.of(pb.StatsResponse())


def missing() -> str | None:
    """Why there can be no such rows; None where there can."""
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    return "transformers is not installed, so its rows are left out: pip install torch transformers"


class Reference:
    """The running library, with one model. A context manager; to be entered in the main thread."""

    def __init__(
        self, folder: Path, precision: str, device: str, compiles: bool, loads: Sequence[Load], progress: Progress
    ) -> None:
        """`compiles`: torch.compile is tried, too, which takes up to a minute for each load."""
        self._folder, self._precision, self._device, self._compiles = folder, precision, device, compiles
        self._loads, self._progress = loads, progress
        self._vocabulary = ModelConfig.from_hf(folder).vocabulary
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cleave-"))
            self._child = Child(f"process of {TRANSFORMERS}", self._argv(f"{folder}/socket"), ROOT, None, lambda: None)
            stack.callback(self._child.reap)
            stack.callback(self._child.kill)
            self._child.await_line("serving", LOAD_SECONDS, f"loading {TRANSFORMERS}", self._progress)
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(STEP_SECONDS)
            connection.connect(f"{folder}/socket")
            self._file = stack.enter_context(connection.makefile("rw"))
            for load in self._loads:
                self._progress(f"tuning {TRANSFORMERS} {self._precision}", 0)
                self._request({"tune": prompts_of(load, self._vocabulary), "room": load.tokens}, 1)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def repeat(self, load: Load) -> Sample:
        """One repetition."""
        self._progress(f"measuring {TRANSFORMERS} {self._precision}", 0)
        prompts = {"prompts": prompts_of(load, self._vocabulary), "room": load.tokens}
        started = time.monotonic()
        first = self._request(prompts, 1)[0] - started
        cpu = self._cpu()
        times, used = self._request({"tokens": load.tokens}, load.tokens), self._cpu()
        return Sample(
            first,
            [(times[-1] - times[0]) / (len(times) - 1)] * load.batch,
            load.batch * load.tokens,
            _NOTHING,
            _NOTHING,
            {role: used[role] - cpu[role] for role in used},
            None,
            (_NOTHING, _NOTHING),
        )

    def resident(self) -> dict[str, int]:
        """Resident bytes by role, now."""
        return {role: resident_bytes(pid) for role, pid in self._pids().items()}

    def _request(self, request: dict[str, Any], count: int) -> list[float]:
        """When each of `count` lines came. Raises DeadlineError, or UnavailableError when the process is gone."""
        try:
            self._file.write(json.dumps(request) + "\n")
            self._file.flush()
            return [self._line() for _ in range(count)]
        except TimeoutError:
            raise DeadlineError(f"{TRANSFORMERS} gave no token for {STEP_SECONDS:g} s") from None
        except OSError:
            raise UnavailableError(self._child.epitaph()) from None

    def _line(self) -> float:
        if not self._file.readline():
            raise ConnectionResetError
        return time.monotonic()

    def _cpu(self) -> dict[str, float]:
        return {role: cpu_seconds(pid) for role, pid in self._pids().items()}

    def _pids(self) -> dict[str, int]:
        return {CLIENT: os.getpid(), TRANSFORMERS: self._child.pid}

    def _argv(self, path: str) -> list[str]:
        argv = ["-m", "evaluation.reference_worker", "--model", str(self._folder.resolve()), "--socket", path]
        argv += ["--compile"] if self._compiles else []
        threads = str(os.cpu_count() or 1)
        return [*argv, "--precision", self._precision, "--device", self._device, "--threads", threads]
