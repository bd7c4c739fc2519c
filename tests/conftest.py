"""Model folders and schemes that all tests share. Folders are made once a session."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.shield import build_shield
from tests.model_folders import MODELS, greedy_reference, save, transformers_logits
from tests.rows import forward
from tests.simulators.in_process import InProcessWorker
from tests.simulators.workers import HonestWorker
from trusted_worker.adapters import Adapter, Adapters
from trusted_worker.arithmetic import F32
from trusted_worker.assembly import assemble
from trusted_worker.config import parse
from trusted_worker.model import Batch, Run
from trusted_worker.pad_bank import Bank
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire.checkpoint import Checkpoint
from wire.linears import all_specs, lookup_spec
from wire.model_config import ModelConfig
from wire.sheets import row_bytes
from wire.v1 import gpu_worker_pb2 as pb

__all__ = ["MODELS", "Rig", "build", "forward", "greedy_reference", "model_folder", "one_run", "transformers_logits"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder(name)` for a name in MODELS: a folder of random weights."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            save(name, folder)
        return folder

    return make


@dataclass
class Rig:
    """One scheme over one model, in this process, with a worker of the test's choice."""

    scheme: Any
    worker: Any  # HonestWorker, or InProcessWorker for schemes that run the model out there
    config: ModelConfig
    memory: SecureMemory
    scratch: Scratch
    rows: int = 64  # that one step may have
    adapters: Adapters | None = None

    @property
    def weights(self) -> Weights:
        """Those of the trusted side, where it has any."""
        found: Weights = self.scheme._weights
        return found

    @property
    def bank(self) -> Bank:
        """secure-infer's pads."""
        found: Bank = self.scheme._bank
        return found

    def fill(self) -> None:
        """Refill until the bank is full."""
        while self.scheme.idle():
            pass

    def logits(self, ids: list[int], chunks: list[int] | None = None, adapter: Adapter | None = None) -> F32:
        """Logits of every position, float32[len(ids), vocabulary], in the given chunk sizes (default: one by one)."""
        cache = self.scheme.open(len(ids))
        out, start = [], 0
        sizes = [min(self.rows, size - at) for size in chunks or [1] * len(ids) for at in range(0, size, self.rows)]
        for size in sizes:
            out.append(forward(self.scheme, one_run(cache, ids[start : start + size], start, adapter)))
            start += size
        cache.free()
        return np.concatenate(out)

    def greedy(self, ids: list[int], count: int, adapter: Adapter | None = None) -> list[int]:
        """`count` greedy tokens after a prompt."""
        cache = self.scheme.open(len(ids) + count)
        logits, tokens, position = forward(self.scheme, one_run(cache, ids, 0, adapter)), [], len(ids)
        for _ in range(count):
            tokens.append(int(logits[-1].argmax()))
            logits = forward(self.scheme, one_run(cache, tokens[-1:], position, adapter))
            position += 1
        cache.free()
        return tokens


def one_run(cache: Any, ids: list[int], position: int, adapter: Adapter | None = None) -> Batch:
    """A batch of one sequence, logits wanted everywhere; its cache is awake."""
    assert cache.wake(len(ids)) == len(ids)
    rows = np.arange(len(ids), dtype=np.int32)
    return Batch(np.array(ids, np.int32), (Run(cache, 0, len(ids), position, adapter),), rows)


def build(
    folder: Path,
    scheme: str,
    precision: str = "int8",
    worker: Callable[[Checkpoint, ModelConfig], Any] = HonestWorker,
    budget: int = 48 << 20,
    bank_rows: int = 64,
    prefill: str = "worker",
    flags: Sequence[str] = (),
) -> Rig:
    """A rig, put together as the trusted worker does it; secure-infer starts with a full bank."""
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    if scheme == "kv-shield":
        shield = build_shield(folder)
        return Rig(shield.scheme, shield.worker, shield.config, shield.memory, shield.scratch)
    bank = bank_rows * row_bytes([*all_specs(config), lookup_spec(config)])
    sizes = ["--memory-budget", str(budget), "--pad-bank", str(bank), "--prefill", prefill]
    settings = parse(["--model", str(folder), "--scheme", scheme, "--precision", precision, *sizes, *flags])
    if scheme == "plain":
        number = pb.PRECISION_INT8 if precision == "int8" else pb.PRECISION_FLOAT32
        simulated: Any = InProcessWorker(folder, config, number)
    else:
        simulated = worker(checkpoint, config)
    memory = SecureMemory(budget)
    assembled = assemble(settings, config, memory, simulated)
    rig = Rig(assembled.scheme, simulated, config, memory, assembled.scratch, assembled.rows, assembled.adapters)
    rig.fill()
    return rig
