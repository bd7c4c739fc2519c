"""Model folders and schemes that all tests share. Folders are made once a session."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.shield import build_shield
from tests.model_folders import MODELS, greedy_reference, save, transformers_logits
from tests.simulators.in_process import InProcessWorker
from tests.simulators.workers import HonestWorker
from trusted_worker.arithmetic import F32
from trusted_worker.model import Batch, Run, scratch_bytes
from trusted_worker.pads import Bank, PadSource, row_bytes
from trusted_worker.schemes.base import Scheme
from trusted_worker.schemes.plain import Plain
from trusted_worker.schemes.secure_infer import SecureInfer
from trusted_worker.schemes.split import Split
from trusted_worker.schemes.tee_only import TeeOnly
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire.checkpoint import Checkpoint
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb

__all__ = ["MODELS", "Rig", "build", "greedy_reference", "model_folder", "one_run", "transformers_logits"]


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

    scheme: Scheme
    worker: Any  # HonestWorker, or InProcessWorker for schemes that run the model out there
    config: ModelConfig
    memory: SecureMemory
    inside: Weights | None = None
    source: PadSource | None = None
    bank: Bank | None = None

    @property
    def weights(self) -> Weights:
        """Those of the trusted side, where it has any."""
        assert self.inside is not None
        return self.inside

    def fill(self) -> None:
        """Refill until the bank is full."""
        while self.scheme.idle():
            pass

    def logits(self, ids: list[int], chunks: list[int] | None = None) -> F32:
        """Logits of every position, float32[len(ids), vocabulary], in the given chunk sizes (default: one by one)."""
        cache = self.scheme.open(len(ids))
        out, start = [], 0
        for size in chunks or [1] * len(ids):
            batch = one_run(cache, ids[start : start + size], start)
            out.append(self.scheme.forward(batch))
            start += size
        cache.free()
        return np.concatenate(out)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """`count` greedy tokens after a prompt."""
        cache = self.scheme.open(len(ids) + count)
        logits, tokens, position = self.scheme.forward(one_run(cache, ids, 0)), [], len(ids)
        for _ in range(count):
            tokens.append(int(logits[-1].argmax()))
            logits = self.scheme.forward(one_run(cache, tokens[-1:], position))
            position += 1
        cache.free()
        return tokens


def one_run(cache: Any, ids: list[int], position: int) -> Batch:
    """A batch of one sequence, logits wanted everywhere."""
    rows = np.arange(len(ids), dtype=np.int32)
    return Batch(np.array(ids, np.int32), (Run(cache, 0, len(ids), position),), rows)


def build(
    folder: Path,
    scheme: str,
    precision: str = "int8",
    worker: Callable[[Checkpoint, ModelConfig], HonestWorker] = HonestWorker,
    budget: int = 48 << 20,
    bank_rows: int = 64,
    prefill: Any = "worker",
) -> Rig:
    """A rig; secure-infer starts with a full bank."""
    if scheme == "kv-shield":
        shield = build_shield(folder)
        return Rig(shield.scheme, shield.worker, shield.config, shield.memory)
    if scheme == "plain":
        return _plain(folder, precision)
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    memory, int8 = SecureMemory(budget), precision == "int8"
    weights = Weights(checkpoint, config, memory, int8)
    scratch = Scratch(memory, scratch_bytes(weights, 64) + 64 * 24 * weights.specs[-1].n)
    simulated = worker(checkpoint, config)
    if scheme == "tee-only":
        return Rig(TeeOnly(weights, memory, scratch, int8), simulated, config, memory, weights)
    if scheme == "split":
        return Rig(Split(weights, memory, scratch, simulated, int8), simulated, config, memory, weights)
    key = secrets.token_bytes(32)
    source, bank = (
        PadSource(key, checkpoint.digest()),
        Bank(key, weights.specs, bank_rows * row_bytes(weights.specs), None),
    )
    infer: Scheme = SecureInfer(weights, memory, scratch, simulated, source, bank, prefill)
    rig = Rig(infer, simulated, config, memory, weights, source, bank)
    rig.fill()
    return rig


def _plain(folder: Path, precision: str) -> Rig:
    config = ModelConfig.from_hf(folder)
    number = pb.PRECISION_INT8 if precision == "int8" else pb.PRECISION_FLOAT32
    outside = InProcessWorker(folder, config, number)
    return Rig(Plain(config, outside), outside, config, SecureMemory(1 << 16))
