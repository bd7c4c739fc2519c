"""A bounds-checked safetensors reader over pread: no mapping, no torch, bfloat16 included.

Format: u64 little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data. Every number in
the header is checked against the file before it is used; the ranges of a file must not overlap. A sharded
checkpoint names its files in model.safetensors.index.json.
"""

import json
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wire.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_OTHER_SIZES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8}


class Source(Protocol):
    """The bytes of one safetensors file, wherever they come from."""

    size: int

    def read(self, offset: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill `into` from `offset` on. Raises CheckpointError when the file does not hold as much."""
        ...

    def close(self) -> None:
        """No more reads."""
        ...


class FileSource:
    """A file on disk, read with pread: what was read is ours, whatever happens to the file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._end = weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def read(self, offset: int, into: npt.NDArray[np.uint8]) -> None:
        """See Source."""
        view, done = into.data, 0
        while done < len(view):
            read = os.preadv(self._file, [view[done : done + (1 << 30)]], offset + done)
            if read <= 0:
                raise CheckpointError("the checkpoint became shorter while it was read")
            done += read

    def close(self) -> None:
        """See Source. Not twice: the number may belong to somebody else by then."""
        self._end()


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its file, absolute offset in bytes, shape, safetensors dtype name."""

    file: Source
    offset: int
    shape: tuple[int, ...]
    dtype: str


def require_folder(folder: Path) -> None:
    """Raises CheckpointError, with what to give instead, for anything but a folder."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give a local folder in Hugging Face layout "
            "(config.json and *.safetensors); model names of a hub are not downloaded"
        )


def to_float32(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Little-endian bytes of dtype F32, F16 or BF16 as float32 (exact). The result may share the input's memory."""
    if dtype == "F32":
        return raw.view("<f4")
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


class Checkpoint:
    """The tensors of a model folder in Hugging Face layout. Raises CheckpointError for whatever does not add up."""

    def __init__(self, folder: Path, suffix: str = "", open_source: Callable[[Path], Source] = FileSource) -> None:
        """`suffix` and `open_source`: what follows the files' usual names, and how such a file is read."""
        require_folder(folder)
        self._tensors: dict[str, TensorInfo] = {}
        self._files: list[Source] = []
        try:
            for path in _shards(folder, suffix):
                self._files.append(open_source(path))
                self._tensors |= _read_header(self._files[-1], path)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, source: Source, name: str) -> "Checkpoint":
        """The tensors of one safetensors file, which errors call `name`."""
        made = cls.__new__(cls)
        made._files, made._tensors = [source], _read_header(source, Path(name))
        return made

    @property
    def names(self) -> set[str]:
        """Those of all tensors."""
        return set(self._tensors)

    def close(self) -> None:
        """Close the files; reads fail afterwards."""
        while self._files:
            self._files.pop().close()

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises CheckpointError when it is missing or has no float dtype."""
        info = self._find(name)
        if info is None:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint")
        if info.dtype not in _SIZES:
            raise CheckpointError(f"tensor {name} has dtype {info.dtype}; F32, F16 and BF16 are supported")
        return info

    def read(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A whole tensor as float32. Raises CheckpointError for another shape, or values that are not finite."""
        return self._read(name, shape, 0, math.prod(shape)).reshape(shape)

    def read_rows(self, name: str, shape: tuple[int, int], start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop of a matrix as float32[stop-start, shape[1]]."""
        return self._read(name, shape, start * shape[1], (stop - start) * shape[1]).reshape(stop - start, shape[1])

    def read_columns(self, name: str, shape: tuple[int, int], start: int, stop: int) -> npt.NDArray[np.float32]:
        """Columns start to stop of a matrix, as rows: float32[stop-start, shape[0]], C-contiguous."""
        columns = np.empty((shape[0], stop - start), np.float32)
        for row in range(shape[0]):
            columns[row] = self._read(name, shape, row * shape[1] + start, stop - start)
        return np.ascontiguousarray(columns.T)

    def _find(self, name: str) -> TensorInfo | None:
        """A checkpoint saved from the model without its head leaves out the first part of every name."""
        return self._tensors.get(name) or self._tensors.get(name.partition(".")[2])

    def _read(self, name: str, shape: tuple[int, ...], first: int, count: int) -> npt.NDArray[np.float32]:
        info = self.info(name)
        if info.shape != shape:
            raise CheckpointError(f"tensor {name} has shape {info.shape}; the configuration asks for {shape}")
        size = _SIZES[info.dtype]
        flat = np.empty(count * size, np.uint8)
        info.file.read(info.offset + first * size, flat)
        values = to_float32(flat, info.dtype)
        if not (np.isfinite(values.max(initial=0)) and np.isfinite(values.min(initial=0))):
            raise CheckpointError(f"tensor {name} holds values that are not finite")
        return values


def _shards(folder: Path, suffix: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
            raise CheckpointError(f"{index} is not a safetensors index") from error
        paths = [folder / (name + suffix) for name in names]
    else:
        paths = [folder / f"model.safetensors{suffix}"]
    for path in paths:
        if not os.path.isfile(path):  # unlike Path.is_file, False for a name that cannot exist
            raise CheckpointError(f"{path} is missing")
    return paths


def _read_header(file: Source, path: Path) -> dict[str, TensorInfo]:
    size = file.size
    length = int.from_bytes(_bytes(file, 0, min(size, 8)), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"{path}: the header's length does not fit the file; is it truncated?")
    try:
        header = json.loads(_bytes(file, 8, length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _entry(file, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is malformed") from error
    _check_ranges(entries, size - 8 - length, path)
    return tensors


def _entry(file: Source, base: int, entry: dict[str, Any]) -> TensorInfo:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    sizes = _SIZES | _OTHER_SIZES
    if entry["dtype"] not in sizes:
        raise ValueError("dtype")
    if not all(type(n) is int and n >= 0 for n in (start, stop, *shape)):
        raise ValueError("negative or fractional numbers")
    count = 1
    for extent in shape:
        count *= extent
    if stop - start != count * sizes[entry["dtype"]]:
        raise ValueError("shape and length differ")
    return TensorInfo(file, base + start, shape, entry["dtype"])


def _check_ranges(entries: dict[str, dict[str, Any]], size: int, path: Path) -> None:
    end = 0
    for start, stop in sorted(entry["data_offsets"] for entry in entries.values()):
        if start < end or stop > size:
            raise CheckpointError(f"{path}: tensors overlap or reach past the end; is the file truncated?")
        end = stop


def _bytes(file: Source, offset: int, count: int) -> bytes:
    piece = np.empty(count, np.uint8)
    file.read(offset, piece)
    return piece.tobytes()
