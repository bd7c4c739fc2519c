"""The end of a recording, as a GPU worker writes it, and as nobody should."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from client.gateway import recording
from gpu_worker import recording as writing
from gpu_worker.calls import Call
from wire.v1 import gpu_worker_pb2 as pb

QKV = pb.Operation(ring_matmul=pb.RingMatmul(layer=0, linear=pb.LINEAR_QKV))
HEAD = pb.Operation(ring_matmul=pb.RingMatmul(layer=0, linear=pb.LINEAR_LM_HEAD))


class Writer:
    """A GPU worker that records, without the worker."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.recording = writing.Recording(folder, keep)
        self._stream = self.recording.stream()

    def call(self, operation: pb.Operation, up: Any, down: Any = None) -> None:
        self._stream.call(Call(1, operation, cast(Any, None), up), down, None)


def rows(first: int, count: int, width: int = 4) -> Any:
    return np.arange(first * width, (first + count) * width, dtype=np.int32).reshape(count, width)


def test_the_last_rows_of_an_operation_are_found(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    assert recording.last_rows(tmp_path, QKV, 3) is None
    for first in range(0, 20, 2):
        writer.call(QKV, rows(first, 2))
        writer.call(HEAD, rows(100, 1, 9))
    found = recording.last_rows(tmp_path, QKV, 3)
    assert found is not None
    assert found.tolist() == rows(17, 3).tolist()
    assert len(recording.last_rows(tmp_path, QKV, 1000)) == 20  # type: ignore[arg-type]


def test_the_last_calls_are_told_in_their_order(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for operation, count in ((QKV, 1), (HEAD, 2), (QKV, 3)):
        writer.call(operation, rows(7, count), rows(0, 1, 10))
    sent = recording.last(tmp_path, 2)
    assert [(one.operation, one.up.shape, one.bytes_down) for one in sent] == [(HEAD, (2, 4), 40), (QKV, (3, 4), 40)]
    assert sent[1].up.read(8) == np.array([28, 29], np.int32).tobytes()
    assert recording.last(tmp_path, 99)[0].operation == QKV


def test_segments_may_rotate_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SEGMENT_BYTES", 256)
    writer = Writer(tmp_path, keep=2)
    for first in range(64):
        writer.call(QKV, rows(first, 1))
    found = recording.last_rows(tmp_path, QKV, 5)
    assert found is not None
    assert found.tolist() == rows(59, 5).tolist()  # over more than one segment
    (sent,) = recording.last(tmp_path, 1)
    for path in tmp_path.iterdir():
        path.unlink()
    assert sent.up.read(99) == b""
    assert recording.last(tmp_path, 5) == []
    shutil.rmtree(tmp_path)
    assert recording.last(tmp_path, 5) == []
    assert recording.last_rows(tmp_path, QKV, 5) is None


def test_what_is_half_written_is_not_there_yet(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for first in range(3):
        writer.call(QKV, rows(first, 1))
    index = tmp_path / "00000001.jsonl"
    whole = index.read_bytes()
    for cut in range(len(whole) - 1, len(whole) - 60, -1):
        index.write_bytes(whole[:cut])
        assert recording.last_rows(tmp_path, QKV, 9).tolist() == rows(0, 2).tolist()  # type: ignore[union-attr]
    data = tmp_path / "00000001.bin"
    index.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-1])  # the last row lacks a byte
    assert recording.last_rows(tmp_path, QKV, 9).tolist() == rows(0, 2).tolist()  # type: ignore[union-attr]


def test_only_the_tail_of_a_long_index_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "TAIL_BYTES", 1000)
    writer = Writer(tmp_path)
    for first in range(50):
        writer.call(QKV, rows(first, 1))
    line = len((tmp_path / "00000001.jsonl").read_bytes().splitlines(keepends=True)[-1])
    assert len(recording.last(tmp_path, 50)) == 1000 // line


GOOD = {"kind": "call", "operation": "CgIQAQ==", "up": {"dtype": "int32", "shape": [1, 4], "at": 0}}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "held"},
        {"kind": None},
        {"refused": 3},
        {"operation": "!"},
        {"operation": "////"},
        {"operation": 5},
        {"up": None},
        {"up": {}},
        {"up": {"dtype": "float64", "shape": [1, 4], "at": 0}},
        {"up": {"dtype": ["int32"], "shape": [1, 4], "at": 0}},
        {"up": {"dtype": "int32", "shape": [-1, 4], "at": 0}},
        {"up": {"dtype": "int32", "shape": [1.0, 4], "at": 0}},
        {"up": {"dtype": "int32", "shape": [True, 4], "at": 0}},
        {"up": {"dtype": "int32", "shape": 4, "at": 0}},
        {"up": {"dtype": "int32", "shape": [1, 4], "at": -1}},
        {"up": {"dtype": "int32", "shape": [1, 4], "at": 1 << 40}},
        {"down": {"dtype": "int32"}},
    ],
)
def test_lines_that_make_no_sense_are_passed_over(tmp_path: Path, change: dict[str, Any]) -> None:
    lines = [json.dumps(GOOD), json.dumps(GOOD | change), "[]", "{", "null", "\x00", "[" * 9999]
    (tmp_path / "00000001.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "00000001.bin").write_bytes(bytes(16))
    assert len(recording.last(tmp_path, 9)) == 1


def test_a_tensor_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path)
    writer.call(QKV, rows(0, 1))
    writer.call(QKV, rows(1, 8))
    monkeypatch.setattr(recording, "TENSOR_BYTES", 64)
    assert recording.last_rows(tmp_path, QKV, 9).tolist() == rows(0, 1).tolist()  # type: ignore[union-attr]
