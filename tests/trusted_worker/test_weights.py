"""Weights inside: resident or streamed, the same numbers; a disk that changes its mind is caught."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.simulators.workers import read_weight
from trusted_worker.secure_memory import SecureMemory
from trusted_worker.weights import Tile, Weights
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, VerificationError
from wire.linears import Linear, LinearSpec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters, read, weight_name
from wire.quantize import quantize_rows

Folder = Callable[[str], Path]
RESIDENT, STREAMED = 8 << 20, 128 << 10
NAMES = ["llama", "llama-bf16-tied-sharded", "qwen2", "qwen2-f16-tied"]


def _weights(folder: Path, budget: int, int8: bool = True) -> Weights:
    weights = Weights(Checkpoint(folder), ModelConfig.from_hf(folder), SecureMemory(budget), int8)
    weights.load_linears()
    return weights


def _whole(weights: Weights, spec: LinearSpec) -> Tile:
    """All tiles, which must follow each other without a gap."""
    tiles, end = [], 0
    for first, tile in weights.tiles(spec):
        assert first == end
        end += len(tile)
        tiles.append(np.array(tile))
    assert end == spec.n
    return np.concatenate(tiles)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_and_resident_weights_are_the_same_numbers(
    model_folder: Folder, name: str, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trusted_worker.weights.TILE_ELEMENTS", 3000)  # several tiles for each linear
    folder = model_folder(name)
    checkpoint = Checkpoint(folder)
    resident = _weights(folder, RESIDENT, int8)
    streamed = _weights(folder, STREAMED if int8 else 3 * STREAMED, int8)
    assert len(resident._resident) == len(resident.specs)
    assert len(streamed._resident) == (1 if streamed.config.tied else 0)  # a tied head is the resident embedding
    for spec in resident.specs:
        assert list(resident.specs) == list(streamed.specs)
        weight = read_weight(checkpoint, resident.config, spec)
        expected = quantize_rows(weight) if int8 else (weight, None)
        for one in (resident, streamed):
            whole = _whole(one, spec)
            assert whole.dtype == (np.int8 if int8 else np.float32)
            assert (whole == expected[0]).all()
            if int8:
                assert (one.scale[spec] == expected[1]).all()
                squares = (expected[0].astype(np.int64) ** 2).sum(axis=1)
                assert one.row_square(spec) == squares.max()
            bias = parameters(one.config).get(Name(Kind.LINEAR, spec.layer, spec.linear, bias=True))
            kept = one.bias[spec]
            assert (kept is None) == (bias is None)
            assert kept is None or bias is None or (kept == read(checkpoint, bias)[:, 0]).all()


def test_streamed_tiles_can_be_read_again_and_leave_the_budget_alone(model_folder: Folder) -> None:
    weights = _weights(model_folder("llama"), STREAMED)
    used = weights._memory.used
    spec = weights.specs[0]
    assert (_whole(weights, spec) == _whole(weights, spec)).all()
    assert weights._memory.used == used <= STREAMED


@pytest.mark.parametrize("int8", [True, False])
def test_embedding_rows_are_those_of_the_table(model_folder: Folder, int8: bool) -> None:
    folder = model_folder("qwen2")
    weights = _weights(folder, RESIDENT, int8)
    config = weights.config
    table = read(Checkpoint(folder), parameters(config)[Name(Kind.EMBEDDING)])
    ids = np.array([0, 5, 5, config.vocabulary - 1], np.int32)
    out = np.empty((4, config.hidden), np.float32)
    weights.embed(ids, out)
    if int8:
        step = np.abs(table[ids]).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(out - table[ids]) <= 0.5001 * step)
    else:
        assert (out == table[ids]).all()


def test_a_budget_that_is_too_small_is_refused_in_bytes(model_folder: Folder) -> None:
    from wire.errors import ExhaustedError

    with pytest.raises(ExhaustedError, match="bytes"):
        _weights(model_folder("llama"), 8192)


def _changed(folder: Path, spec: LinearSpec, change: Callable[[Path, int], None]) -> None:
    """Change the file under the open descriptor, at the first weight of the linear's second part."""
    file = folder / "model.safetensors"
    config = ModelConfig.from_hf(folder)
    tensor = parameters(config)[weight_name(config, spec)].tensors[-1][0]
    info = Checkpoint(folder).info(tensor)
    change(file, info.offset)


def _overwrite(data: bytes) -> Callable[[Path, int], None]:
    def change(file: Path, offset: int) -> None:
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(data)

    return change


def _truncate(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(offset)


CHANGES: dict[str, Callable[[Path, int], None]] = {
    "another number": _overwrite(np.array([3.5], np.float32).tobytes()),
    "a row of zeros": _overwrite(bytes(4 * 64)),
    "not a number": _overwrite(np.array([np.nan], np.float32).tobytes()),
    "infinity": _overwrite(np.array([np.inf], np.float32).tobytes()),
    "a shorter file": _truncate,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_disk_that_changes_its_mind_is_caught_with_one_and_the_same_error(
    model_folder: Folder, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(model_folder("llama"), folder)
    weights = _weights(folder, STREAMED)
    spec = next(spec for spec in weights.specs if spec.linear is Linear.GATE_UP)
    before = _whole(weights, spec)
    _changed(folder, spec, CHANGES[change])
    with pytest.raises(VerificationError):
        _whole(weights, spec)
    assert len(before) == spec.n


def test_a_disk_that_changes_does_not_reach_resident_weights(model_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(model_folder("llama"), folder)
    weights = _weights(folder, RESIDENT)
    spec = weights.specs[2]
    before = _whole(weights, spec)
    _changed(folder, spec, _truncate)
    assert (_whole(weights, spec) == before).all()


def test_a_checkpoint_of_another_shape_is_refused(model_folder: Folder) -> None:
    from dataclasses import replace

    folder = model_folder("llama")
    config = replace(ModelConfig.from_hf(folder), ffn=100)
    weights = Weights(Checkpoint(folder), replace(config, mlp_bias=False), SecureMemory(RESIDENT), int8=True)
    with pytest.raises(CheckpointError, match="shape"):
        weights.load_linears()
