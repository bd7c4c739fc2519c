"""Model folders and schemes that all tests share. Folders are made once, with transformers, from fixed seeds."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.simulators.workers import HonestWorker
from trusted_worker.arithmetic import F32
from trusted_worker.model import Batch, Run, scratch_bytes
from trusted_worker.pads import Bank, PadSource, row_bytes
from trusted_worker.schemes.base import Scheme
from trusted_worker.schemes.secure_infer import SecureInfer
from trusted_worker.schemes.split import Split
from trusted_worker.schemes.tee_only import TeeOnly
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire.checkpoint import Checkpoint
from wire.model_config import ModelConfig

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 256,
    "eos_token_id": 300,
    "bos_token_id": 1,
}
MODELS = ("llama", "llama-bf16-tied-sharded", "qwen2", "qwen2-f16-tied")


def _save(name: str, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(MODELS.index(name))
    tied = "tied" in name
    if name.startswith("llama"):
        biased = not tied
        model: Any = LlamaForCausalLM(
            LlamaConfig(**SIZES, tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
        )
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.2 if "bias" in key or "norm" in key else 0.08)
    dtype = torch.bfloat16 if "bf16" in name else torch.float16 if "f16" in name else torch.float32
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB" if "sharded" in name else "1GB")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder(name)` for a name in MODELS: a random-weight folder from save_pretrained."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            _save(name, folder)
        return folder

    return make


def transformers_logits(folder: Path, ids: list[int]) -> F32:
    """Reference logits float32[len(ids), vocabulary], computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: F32 = model(torch.tensor([ids])).logits[0].numpy()
    return logits


@dataclass
class Rig:
    """One scheme over one model, in this process, with a worker of the test's choice."""

    scheme: Scheme
    worker: HonestWorker
    config: ModelConfig
    memory: SecureMemory
    weights: Weights
    source: PadSource | None = None
    bank: Bank | None = None

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


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]
