"""Weights inside: resident or parked, the same numbers; a disk that changes its mind is caught."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.simulators.workers import read_weight
from trusted_worker.opener import Opener
from trusted_worker.parked_tiles import DigestedTiles, TileStore
from trusted_worker.sealed_pages import PageStore
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Tile, Weights
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, ExhaustedError, ParkedError, VerificationError
from wire.layout import Layout
from wire.linears import LinearSpec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters, read
from wire.quantize import quantize_rows

Folder = Callable[[str], Path]
RESIDENT, PARKED = Layout("resident", "resident", "resident"), Layout("scan", "parked", "parked")
NAMES = ["llama", "llama-bf16-tied-sharded", "qwen2", "qwen2-f16-tied", "gpt2"]
STORES: dict[str, Callable[[], TileStore]] = {
    "digested": lambda: DigestedTiles(None),
    "unchecked": lambda: DigestedTiles(None, unchecked=True),
    "sealed": lambda: PageStore(os.urandom(32), None).sequence(),
}


class Shelf:
    """Weights with a store and a scratch of their own."""

    def __init__(
        self, folder: Path, layout: Layout, int8: bool = True, store: str = "digested", budget: int = 8 << 20
    ) -> None:
        self.store, self.memory = STORES[store](), SecureMemory(budget)
        self.config = ModelConfig.from_hf(folder)
        self.weights = Weights(Checkpoint(folder), self.config, self.memory, int8, layout, self.store, Opener())
        self.scratch = Scratch(self.memory, 1 << 20)

    def whole(self, spec: LinearSpec) -> Tile:
        """All tiles, which must follow each other without a gap."""
        found, end = [], 0
        with self.weights.tiles(spec, self.scratch) as tiles:
            for first, tile in tiles:
                assert first == end
                end += len(tile)
                found.append(np.array(tile))
        assert end == spec.n
        return np.concatenate(found)

    def embed(self, ids: list[int]) -> Any:
        """Rows of the embedding table."""
        out = np.empty((len(ids), self.config.hidden), np.float32)
        self.weights.embed(np.array(ids, np.int32), out, self.scratch)
        return out


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for each matrix, which begin within its tensors and end beyond them."""
    monkeypatch.setattr("wire.layout.TILE_ELEMENTS", 3000)
    monkeypatch.setattr("trusted_worker.weights.PIECE_ELEMENTS", 1700)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_parked_and_resident_weights_are_the_same_numbers(
    model_folder: Folder, name: str, int8: bool, store: str
) -> None:
    folder = model_folder(name)
    checkpoint = Checkpoint(folder)
    resident, parked = Shelf(folder, RESIDENT, int8), Shelf(folder, PARKED, int8, store)
    assert resident.store.size == 0 < parked.store.size
    for spec in resident.weights.specs:
        weight = read_weight(checkpoint, resident.config, spec)
        expected = quantize_rows(weight) if int8 else (weight, None)
        for one in (resident, parked):
            whole = one.whole(spec)
            assert whole.dtype == (np.int8 if int8 else np.float32)
            assert (whole == expected[0]).all()
            if int8:
                assert (one.weights.scale(spec) == expected[1]).all()
                squares = (expected[0].astype(np.int64) ** 2).sum(axis=1)
                assert one.weights.bound(spec).row_square == squares.max()
            bias = parameters(one.config).get(Name(Kind.LINEAR, spec.layer, spec.linear, bias=True))
            kept = one.weights.bias[spec]
            assert (kept is None) == (bias is None)
            assert kept is None or bias is None or (kept == read(checkpoint, bias)[:, 0]).all()


def test_parked_tiles_can_be_read_again_and_leave_the_budget_alone(model_folder: Folder) -> None:
    shelf = Shelf(model_folder("llama"), PARKED)
    used, spec = shelf.memory.used, shelf.weights.specs[0]
    assert (shelf.whole(spec) == shelf.whole(spec)).all()
    assert shelf.memory.used == used
    assert "weights" not in shelf.memory.by_owner()
    assert "loading" not in shelf.memory.by_owner()


@pytest.mark.parametrize("embed", ["resident", "scan", "read"])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "qwen2-f16-tied"])
def test_embedding_rows_are_those_of_the_table(model_folder: Folder, name: str, int8: bool, embed: str) -> None:
    folder = model_folder(name)
    table = {"resident": "resident", "scan": "parked", "read": "absent"}[embed]
    shelf = Shelf(folder, Layout(embed, table, "parked" if table != "absent" else "absent"), int8)
    expected = read(Checkpoint(folder), parameters(shelf.config)[Name(Kind.EMBEDDING)])
    ids = [0, 5, 5, shelf.config.vocabulary - 1]
    if int8:
        quantized, scale = quantize_rows(expected)
        expected = quantized.astype(np.float32) * scale[:, None]
    assert (shelf.embed(ids) == expected[ids]).all()


def test_what_a_scan_reads_does_not_depend_on_the_tokens(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(model_folder("qwen2"), PARKED)
    reads: list[list[tuple[int, int]]] = []
    preadv = os.preadv

    def spy(file: int, buffers: Any, offset: int) -> int:
        reads[-1].append((offset, sum(len(one) for one in buffers)))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    for ids in ([0], [299], [7] * 40, list(range(64))):
        reads.append([])
        shelf.embed(ids)
    assert len(reads[0]) == -(-shelf.config.vocabulary // (3000 // shelf.config.hidden // 4 * 4))
    assert all(one == reads[0] for one in reads)
    assert shelf.weights.table_scans == 4


def test_a_budget_that_is_too_small_is_refused_in_bytes(model_folder: Folder) -> None:
    with pytest.raises(ExhaustedError, match="bytes"):
        Shelf(model_folder("llama"), RESIDENT, budget=8192)


def _change(file: int, change: str) -> None:
    """What a hostile host does to the first tiles, which are those of the embedding table."""
    if change == "a bit":
        os.pwrite(file, bytes([os.pread(file, 1, 40)[0] ^ 1]), 40)
    elif change == "zeros":
        os.pwrite(file, bytes(4096), 0)
    else:
        os.ftruncate(file, {"a shorter file": 64, "an empty file": 0}[change])


@pytest.mark.parametrize("store", ["digested", "sealed"])
@pytest.mark.parametrize("change", ["a bit", "zeros", "a shorter file", "an empty file", "an unreadable file"])
def test_a_disk_that_changes_its_mind_is_caught_with_one_and_the_same_error(
    model_folder: Folder, change: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(model_folder("llama"), PARKED, store=store)
    shelf.embed([7])
    if change == "an unreadable file":
        for call in ("pread", "preadv"):
            monkeypatch.setattr(os, call, _broken)
    else:
        _change(shelf.store._file.fileno(), change)  # type: ignore[attr-defined]
    with pytest.raises(ParkedError) as caught:
        shelf.embed([7])
    assert str(caught.value) == str(VerificationError())
    with shelf.scratch.frame():  # all of it is free again
        shelf.scratch.empty((shelf.scratch._block.size,), np.uint8)


def _broken(*_: object) -> int:
    raise OSError(5, "Input/output error")


def test_a_change_goes_unnoticed_only_where_that_was_asked_for(model_folder: Folder) -> None:
    shelf = Shelf(model_folder("llama"), PARKED, store="unchecked")
    before = shelf.embed([0])
    _change(shelf.store._file.fileno(), "zeros")  # type: ignore[attr-defined]
    assert not (shelf.embed([0]) == before).all()


@pytest.mark.parametrize("store", ["digested", "sealed"])
def test_a_full_disk_is_said_while_loading(model_folder: Folder, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    for call in ("pwrite", "pwritev"):
        monkeypatch.setattr(os, call, full)
    with pytest.raises(ExhaustedError, match="full"):
        Shelf(model_folder("llama"), PARKED, store=store)


def test_a_checkpoint_of_another_shape_is_refused(model_folder: Folder) -> None:
    folder = model_folder("llama")
    config = replace(ModelConfig.from_hf(folder), ffn=100)
    with pytest.raises(CheckpointError, match="shape"):
        Weights(Checkpoint(folder), config, SecureMemory(8 << 20), True, PARKED, DigestedTiles(None), Opener())
