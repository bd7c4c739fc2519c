"""What was measured is what is used: the model's digest, and reads of files that change afterwards."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wire import measured
from wire.checkpoint import Checkpoint, FileSource
from wire.errors import CheckpointError
from wire.measured import CHUNK, LABEL, MeasuredCheckpoint, MeasuredSource
from wire.model_config import ModelConfig

CASES = settings(deadline=None, max_examples=100, derandomize=True)
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
Folder = Callable[[str], Path]


def _open(folder: Path) -> MeasuredCheckpoint:
    return MeasuredCheckpoint(folder, ModelConfig.from_hf(folder))


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def sharded(model_folder: Folder, tmp_path: Path) -> Path:
    """Two files under a configuration that they do not fit: nobody looks."""
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((model_folder("llama") / name).read_bytes())
    for name in ("one", "two"):
        save_file({name: torch.ones(CHUNK // 4 + 3)}, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {n: f"{n}.safetensors" for n in ("two", "one")}}))
    return tmp_path


def test_the_digest_is_what_its_description_says(sharded: Path) -> None:
    config = ModelConfig.from_hf(sharded)
    written_out = LABEL + config.digest
    for name in (b"one.safetensors", b"two.safetensors"):
        content = (sharded / name.decode()).read_bytes()
        chunks = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
        assert len(chunks) == 2
        written_out += len(name).to_bytes(4, "big") + name + len(content).to_bytes(8, "big")
        written_out += b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
    assert len(config.digest) == 64
    assert _open(sharded).model_digest == hashlib.sha256(written_out).digest()


def test_the_digest_follows_names_configuration_and_every_file(sharded: Path) -> None:
    seen = {_open(sharded).model_digest}
    assert seen == {_open(sharded).model_digest}
    for name in ("one.safetensors", "two.safetensors", "config.json", "generation_config.json"):
        content = (sharded / name).read_bytes()
        changed = content.replace(b"{", b"{ ", 1) if name.endswith("json") else content[:-1] + bytes([content[-1] ^ 1])
        (sharded / name).write_bytes(changed)
        seen.add(_open(sharded).model_digest)
        (sharded / name).write_bytes(content)
    (sharded / "two.safetensors").rename(sharded / "three.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {n: f"{n}.safetensors" for n in ("one", "three")}}))
    seen.add(_open(sharded).model_digest)
    assert len(seen) == 6


def test_the_folders_name_is_not_in_the_digest(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    digest = _open(sharded).model_digest
    assert _open(sharded.rename(tmp_path_factory.mktemp("other") / "name")).model_digest == digest


@pytest.mark.parametrize("name", ["llama", "llama-bf16-tied-sharded"])
def test_tensors_are_those_of_the_plain_checkpoint(name: str, model_folder: Folder) -> None:
    plain, held = Checkpoint(model_folder(name)), _open(model_folder(name))
    for tensor, info in plain._tensors.items():
        assert (held.read(tensor, info.shape) == plain.read(tensor, info.shape)).all()
        if len(info.shape) == 2:
            rows, columns = (info.shape[0], info.shape[1]), (3, 9)
            assert (held.read_columns(tensor, rows, *columns) == plain.read_columns(tensor, rows, *columns)).all()


class _Pieces:
    """A Source whose reads are noted."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size = bytearray(content), len(content)
        self.reads, self.closed = list[tuple[int, int]](), False

    def read(self, offset: int, into: Any) -> None:
        """See wire.checkpoint.Source."""
        self.reads.append((offset, len(into)))
        into[:] = np.frombuffer(self.content[offset : offset + len(into)], np.uint8)

    def close(self) -> None:
        """See wire.checkpoint.Source."""
        self.closed = True


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "CHUNK", 16)


def _source(content: bytes) -> tuple[_Pieces, MeasuredSource]:
    inner = _Pieces(content)
    return inner, MeasuredSource(inner, measured._Window())


CONTENT = bytes(range(90))  # five chunks of 16 and one of 10


@pytest.mark.usefixtures("small")
@CASES
@given(st.integers(0, 90), st.integers(0, 90))
def test_any_piece_is_that_of_the_file(one: int, two: int) -> None:
    start, stop = sorted((one, two))
    into = np.empty(stop - start, np.uint8)
    _source(CONTENT)[1].read(start, into)
    assert into.tobytes() == CONTENT[start:stop]


@pytest.mark.usefixtures("small")
@CASES
@given(st.integers(0, 89), st.integers(1, 255), st.integers(0, 89), st.integers(0, 89))
def test_a_change_anywhere_is_noticed_and_nothing_of_it_comes_out(at: int, flips: int, one: int, two: int) -> None:
    start, stop = min(one, two), max(one, two) + 1
    inner, source = _source(CONTENT)
    inner.content[at] ^= flips
    into = np.full(stop - start, 200, np.uint8)
    chunk = at // 16 * 16
    if stop <= chunk or start >= chunk + 16:
        source.read(start, into)
        assert into.tobytes() == CONTENT[start:stop]
        return
    for _ in range(2):
        with pytest.raises(CheckpointError, match="changed on disk after it was measured"):
            source.read(start, into)
    good = max(0, chunk - start)
    assert into.tobytes() == CONTENT[start : start + good] + bytes([200]) * (len(into) - good)
    inner.content[at] ^= flips
    source.read(start, into)
    assert into.tobytes() == CONTENT[start:stop]


@pytest.mark.usefixtures("small")
def test_a_chunk_that_is_read_piece_by_piece_is_read_once() -> None:
    inner, source = _source(CONTENT)
    inner.reads.clear()
    for start in range(0, 90, 5):
        source.read(start, np.empty(5, np.uint8))
    assert inner.reads == [(start, min(16, 90 - start)) for start in range(0, 90, 16)]


@pytest.mark.usefixtures("small")
def test_sources_that_share_a_window_do_not_mix_up() -> None:
    window = measured._Window()
    sources = [MeasuredSource(_Pieces(content), window) for content in (CONTENT, CONTENT[::-1])]
    into = np.empty(3, np.uint8)
    for source, first in (*zip(sources, (20, 69), strict=True), (sources[0], 20)):
        source.read(20, into)
        assert into[0] == first


@pytest.mark.usefixtures("small")
def test_nothing_is_read_past_the_end_and_an_empty_file_is_fine() -> None:
    _, source = _source(CONTENT)
    with pytest.raises(CheckpointError, match="shorter"):
        source.read(85, np.empty(6, np.uint8))
    assert _source(b"")[1].digests == b""


@pytest.mark.usefixtures("small")
def test_closing_closes_the_file_and_wipes_what_was_kept() -> None:
    window = measured._Window()
    inner = _Pieces(CONTENT)
    source = MeasuredSource(inner, window)
    source.read(0, np.empty(90, np.uint8))
    assert window.buffer.any()
    source.close()
    assert inner.closed
    assert not window.buffer.any()
    assert window.holds is None


def test_a_file_swapped_between_measuring_and_loading_is_noticed(sharded: Path) -> None:
    checkpoint = _open(sharded)
    count = CHUNK // 4 + 3
    with (sharded / "two.safetensors").open("r+b") as file:
        file.seek(checkpoint.info("two").offset + 4 * (count - 1))
        file.write(b"\0\0\0\x41")
    assert (checkpoint.read("one", (count,)) == 1).all()
    assert (checkpoint._read("two", (count,), 0, 100) == 1).all()  # of its first chunk
    with pytest.raises(CheckpointError, match="changed on disk"):
        checkpoint.read("two", (count,))
    checkpoint.close()


def test_a_file_cut_after_it_was_measured_is_noticed(sharded: Path) -> None:
    checkpoint = _open(sharded)
    os.truncate(sharded / "one.safetensors", CHUNK)
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.read("one", (CHUNK // 4 + 3,))
    checkpoint.close()


def test_files_are_closed_when_measuring_fails(sharded: Path) -> None:
    class Broken(FileSource):
        def read(self, offset: int, into: Any) -> None:
            """See wire.checkpoint.Source."""
            if offset:
                raise CheckpointError("broken")
            super().read(offset, into)

    before = _descriptors()
    with pytest.raises(CheckpointError, match="broken"):
        MeasuredCheckpoint(sharded, ModelConfig.from_hf(sharded), "", Broken)
    assert _descriptors() == before
