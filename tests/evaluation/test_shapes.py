"""Folders of random weights: what they hold, and that a half-made one is never used."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from client.shapes import SHAPES
from client.terminal import quiet
from evaluation import shapes
from evaluation.shapes import model_folder
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, ExhaustedError
from wire.measured import MeasuredCheckpoint
from wire.model_config import ModelConfig
from wire.parameters import Kind, parameters, read

TINY: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
    },
    "chatglm3-6b": {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "kv_channels": 8,
        "num_attention_heads": 4,
        "num_layers": 2,
        "padded_vocab_size": 97,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 97},
}


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes, a cache of this test, and pieces that do not divide anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shapes, "_PIECE", 100)
    for name, sizes in TINY.items():
        monkeypatch.setitem(SHAPES, name, SHAPES[name] | sizes)


@pytest.mark.parametrize("name", TINY)
def test_a_shape_becomes_a_folder_that_loads(name: str) -> None:
    folder = model_folder(f"shape:{name}", quiet)
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    assert (config.name, config.hidden, config.layers, config.vocabulary) == (name, 32, 2, 97)
    for parameter in parameters(config).values():
        values = read(checkpoint, parameter)
        assert values.shape == (parameter.rows, parameter.width)
        if parameter.name.bias:
            assert not values.any()
        elif parameter.width == 1:
            assert (values == 1).all()
        else:
            assert np.isfinite(values).all()
            assert 0.01 < values.std() < 0.03
            assert len(np.unique(values[:, 0])) > 1


def test_a_folder_is_made_once_and_always_the_same(tmp_path: Path) -> None:
    folder = model_folder("shape:qwen2.5-0.5b", quiet)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    first = MeasuredCheckpoint(folder, ModelConfig.from_hf(folder)).model_digest
    assert model_folder("shape:qwen2.5-0.5b", quiet) == folder == tmp_path / "cleave" / "shapes" / "qwen2.5-0.5b"
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    shutil.rmtree(folder)
    again = model_folder("shape:qwen2.5-0.5b", quiet)
    assert MeasuredCheckpoint(again, ModelConfig.from_hf(again)).model_digest == first


def test_a_big_one_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHARD_BYTES", 5000)
    folder = model_folder("shape:qwen2.5-0.5b", quiet)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    config = ModelConfig.from_hf(folder)
    for parameter in parameters(config).values():
        assert read(Checkpoint(folder), parameter).shape == (parameter.rows, parameter.width)
    assert Kind.EMBEDDING in {name.kind for name in parameters(config)}


def test_a_half_made_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    calls = 0

    def interrupted(stage: str, seconds: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_folder("shape:gpt2", interrupted)
    assert list((tmp_path / "cleave" / "shapes").iterdir()) == []
    assert ModelConfig.from_hf(model_folder("shape:gpt2", quiet)).name == "gpt2"


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(ExhaustedError, match=r"the disk has 1\.1 GB left"):
        model_folder("shape:gpt2", quiet)
    assert list((tmp_path / "cleave" / "shapes").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        model_folder("shape:gpt2", quiet)


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"no shape gpt5; known are .*qwen2\.5-0\.5b"):
        model_folder("shape:gpt5", quiet)


def test_anything_else_is_a_folder() -> None:
    assert model_folder("models/demo", quiet) == Path("models/demo")
