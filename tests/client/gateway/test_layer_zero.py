"""What anybody can compute of the first product: against the trusted worker's own arithmetic, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.embedding import EmbeddingTable
from client.flags import DEMO_MODEL
from client.gateway.layer_zero import LayerZero
from tests.simulators.workers import read_weight
from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, I32, Bound
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, InvalidArgumentError
from wire.linears import Linear, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters, read
from wire.quantize import quantize_rows

IDS = [3, 17, 100, 2047, 17]


def inside(folder: Path, precision: str) -> tuple[F32, Scratch]:
    """What the trusted worker gives to its first product for IDS."""
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    scratch = Scratch(SecureMemory(4 << 20), 3 << 20)
    gain = read(checkpoint, parameters(config)[Name(Kind.ATTENTION_NORM)])[:, 0]
    table = EmbeddingTable(folder, precision)
    hidden = np.frombuffer(table.rows(IDS), np.float32).reshape(len(IDS), -1)
    return arithmetic.rms_norm(hidden, gain, config.norm_eps, scratch), scratch


def quantised(folder: Path) -> I32:
    normed, scratch = inside(folder, "int8")
    config = ModelConfig.from_hf(folder)
    weights, _ = quantize_rows(read_weight(Checkpoint(folder), config, spec(config, 0, Linear.QKV)))
    squares = (weights.astype(np.int64) ** 2).sum(axis=1)
    return arithmetic.quantize(normed, Bound(config.hidden, int(squares.max())), scratch)[0]


def test_it_makes_the_rows_that_split_sends() -> None:
    assert LayerZero(DEMO_MODEL, "int8").sent(IDS).tolist() == quantised(DEMO_MODEL).tolist()
    assert LayerZero(DEMO_MODEL, "float32").sent(IDS).tolist() == inside(DEMO_MODEL, "float32")[0].tolist()


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_rows_without_a_mask_name_their_tokens(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.gateway.layer_zero.TILE_ROWS", 300)
    layer_zero = LayerZero(DEMO_MODEL, precision)
    ids = list(range(5, 2048, 37))
    assert layer_zero.nearest(layer_zero.sent(ids)) == ids


def test_masked_rows_name_others() -> None:
    layer_zero, random = LayerZero(DEMO_MODEL, "int8"), np.random.default_rng(1)
    sent = layer_zero.sent(IDS * 4)
    pads = random.integers(-(1 << 31), 1 << 31, sent.shape, np.int64)
    masked = (sent + pads).astype(np.uint32).view(np.int32)
    named = layer_zero.nearest(masked)
    assert sum(one == right for one, right in zip(named, IDS * 4, strict=True)) <= 1  # 20 guesses among 2,048


def test_ids_that_cannot_exist_are_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        LayerZero(DEMO_MODEL, "int8").sent([2048])


@pytest.mark.parametrize("name", ["qwen2-f16-tied", "chatglm3"])
def test_families(name: str, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder(name)
    layer_zero, ids = LayerZero(folder, "int8"), [1, 7, 300]
    assert np.abs(layer_zero.sent(ids)).max() > 1 << 16
    assert layer_zero.nearest(layer_zero.sent(ids)) == ids


def test_learned_positions_are_not_compared(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="positions"):
        LayerZero(model_folder("gpt2"), "float32")
