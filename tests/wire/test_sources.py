"""Where a checkpoint's bytes come from: any Source, under any suffix, each closed in the end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wire.checkpoint import Checkpoint, FileSource, Source
from wire.errors import CheckpointError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Memory:
    """A Source over the same bytes, all of them inverted on disk."""

    opened: list["_Memory"]

    def __init__(self, path: Path) -> None:
        self._content = 255 - np.frombuffer(path.read_bytes(), np.uint8)
        self.size, self.closed = len(self._content), False
        _Memory.opened.append(self)

    def read(self, offset: int, into: Any) -> None:
        """See wire.checkpoint.Source."""
        if offset + len(into) > self.size:
            raise CheckpointError("shorter")
        into[:] = self._content[offset : offset + len(into)]

    def close(self) -> None:
        """See wire.checkpoint.Source."""
        self.closed = True


def _inverted(folder: Path, tensors: dict[str, torch.Tensor], names: tuple[str, ...] = (FILE,)) -> None:
    _Memory.opened = []
    for name in names:
        save_file(tensors, folder / name)
        plain = np.frombuffer((folder / name).read_bytes(), np.uint8)
        (folder / f"{name}.inverted").write_bytes((255 - plain).tobytes())


def test_another_source_and_suffix_give_the_same_tensors(tmp_path: Path) -> None:
    _inverted(tmp_path, {"one": torch.arange(6.0).reshape(2, 3)})
    (tmp_path / FILE).unlink()
    checkpoint = Checkpoint(tmp_path, ".inverted", _Memory)
    assert checkpoint.read("one", (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint.read_columns("one", (2, 3), 1, 2).tolist() == [[1, 4]]
    checkpoint.close()
    assert [one.closed for one in _Memory.opened] == [True]


def test_the_suffix_follows_the_names_of_shards_too(tmp_path: Path) -> None:
    _inverted(tmp_path, {"one": torch.ones(2)}, ("a.safetensors", "b.safetensors"))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}))
    assert "one" in Checkpoint(tmp_path, ".inverted", _Memory)
    with pytest.raises(CheckpointError, match=r"a\.safetensors\.sealed is missing"):
        Checkpoint(tmp_path, ".sealed", _Memory)


def test_every_source_is_closed_when_one_of_them_lies(tmp_path: Path) -> None:
    _inverted(tmp_path, {"one": torch.ones(2)}, ("a.safetensors", "b.safetensors"))
    (tmp_path / "b.safetensors.inverted").write_bytes(bytes(100))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        Checkpoint(tmp_path, ".inverted", _Memory)
    assert [one.closed for one in _Memory.opened] == [True, True]


def test_a_file_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(bytes(range(10)))
    source: Source = FileSource(tmp_path / "bytes")
    into = np.zeros(4, np.uint8)
    source.read(3, into)
    assert (source.size, into.tolist()) == (10, [3, 4, 5, 6])
    with pytest.raises(CheckpointError, match="shorter"):
        source.read(7, into)
    source.close()
