"""A bounds-checked safetensors reader over pread: no mapping, no torch, bfloat16 included.

Format: u64 little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data. Every number in
the header is checked against the file before it is used; the ranges of a file must not overlap. A sharded
checkpoint names its files in model.safetensors.index.json.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wire.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_OTHER_SIZES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file descriptor, absolute offset in bytes, shape, safetensors dtype name."""

    file: int
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

    def __init__(self, folder: Path) -> None:
        require_folder(folder)
        self._tensors: dict[str, TensorInfo] = {}
        self._files: list[int] = []
        try:
            for path in _shards(folder):
                self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                self._tensors |= _read_header(self._files[-1], path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files; reads fail afterwards."""
        while self._files:
            os.close(self._files.pop())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises CheckpointError when it is missing or has no float dtype."""
        if name not in self._tensors:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint")
        info = self._tensors[name]
        if info.dtype not in _SIZES:
            raise CheckpointError(f"tensor {name} has dtype {info.dtype}; F32, F16 and BF16 are supported")
        return info

    def read(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A whole tensor as float32. Raises CheckpointError when its shape is not the expected one."""
        info = self.info(name)
        if info.shape != shape:
            raise CheckpointError(f"tensor {name} has shape {info.shape}; the configuration asks for {shape}")
        flat = np.empty(int(np.prod(shape)) * _SIZES[info.dtype], np.uint8)
        _pread(info.file, info.offset, flat)
        return to_float32(flat, info.dtype).reshape(shape)

    def read_rows(self, name: str, shape: tuple[int, int], start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop of a matrix as float32[stop-start, shape[1]]."""
        info = self.info(name)
        if info.shape != shape:
            raise CheckpointError(f"tensor {name} has shape {info.shape}; the configuration asks for {shape}")
        width = shape[1] * _SIZES[info.dtype]
        flat = np.empty((stop - start) * width, np.uint8)
        _pread(info.file, info.offset + start * width, flat)
        return to_float32(flat, info.dtype).reshape(stop - start, shape[1])

    def digest(self) -> bytes:
        """SHA-256 over all files, in order of their names: what keys are bound to."""
        total = hashlib.sha256()
        for file in self._files:
            part = hashlib.sha256()
            for offset in range(0, os.fstat(file).st_size, 1 << 22):
                part.update(os.pread(file, 1 << 22, offset))
            total.update(part.digest())
        return total.digest()


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
            raise CheckpointError(f"{index} is not a safetensors index") from error
        paths = [folder / name for name in names]
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if not os.path.isfile(path):  # unlike Path.is_file, False for a name that cannot exist
            raise CheckpointError(f"{path} is missing")
    return paths


def _read_header(file: int, path: Path) -> dict[str, TensorInfo]:
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"{path}: the header's length does not fit the file; is it truncated?")
    try:
        header = json.loads(os.pread(file, length, 8))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _entry(file, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is malformed") from error
    _check_ranges(entries, size - 8 - length, path)
    return tensors


def _entry(file: int, base: int, entry: dict[str, Any]) -> TensorInfo:
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


def _pread(file: int, offset: int, into: npt.NDArray[np.uint8]) -> None:
    view = into.data
    done = 0
    while done < len(view):
        read = os.preadv(file, [view[done : done + (1 << 30)]], offset + done)
        if read <= 0:
            raise CheckpointError("the checkpoint became shorter while it was read")
        done += read
