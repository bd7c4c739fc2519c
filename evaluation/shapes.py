"""Model folders of random weights, in the sizes of well-known models: what `shape:NAME` stands for.

A folder is made once, under the user's cache directory, tensor by tensor and piece by piece: no more than a few
megabytes are in memory. It gets its name when it is complete; a folder that was given up half-way is never used.
Weights are normal with standard deviation 0.02, gains are 1 and biases 0, all in bfloat16: activations stay sane.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from client.shapes import SHAPES, shape
from deploy.local.child import Progress
from wire.errors import CheckpointError, ExhaustedError
from wire.model_config import ModelConfig
from wire.parameters import Parameter, parameters

PREFIX = "shape:"
SPREAD = 0.02
SHARD_BYTES = 4 << 30
SPARE_BYTES = 1 << 30  # of the disk, left free
_PIECE = 1 << 22  # values made at once
_WIDTH = 2  # bytes of a bfloat16

Tensor = tuple[str, tuple[int, ...]]


def model_folder(text: str, progress: Progress) -> Path:
    """The folder that `--model` means; made now if it is that of a shape and not there yet.

    Raises CheckpointError for an unknown shape, ExhaustedError when the disk has no room for it.
    """
    if not text.startswith(PREFIX):
        return Path(text)
    name = text.removeprefix(PREFIX)
    config, folder = shape(name), cache() / name
    if not folder.is_dir():
        make(folder, SHAPES[name], config, progress)
    return folder


def cache() -> Path:
    """Where the folders are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleave" / "shapes"


def make(folder: Path, raw: dict[str, Any], config: ModelConfig, progress: Progress) -> None:
    """Write the folder. Raises ExhaustedError when the disk has no room, CheckpointError when it cannot be written."""
    tensors = [tensor for parameter in parameters(config).values() for tensor in _tensors(parameter)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _require_room(folder, sum(map(_size, tensors)))
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
            part = Path(unfinished) / folder.name
            part.mkdir()
            (part / "config.json").write_text(json.dumps(raw, indent=2))
            _write_shards(part, tensors, progress)
            part.rename(folder)
    except OSError as error:
        if folder.is_dir():  # somebody else has made it meanwhile
            return
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error


def _tensors(parameter: Parameter) -> Iterator[Tensor]:
    for name, rows in parameter.tensors:
        if parameter.width == 1:
            yield name, (rows,)
        else:
            yield name, (parameter.width, rows) if parameter.transposed else (rows, parameter.width)


def _size(tensor: Tensor) -> int:
    return _WIDTH * int(np.prod(tensor[1], dtype=np.int64))


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if needed + SPARE_BYTES > free:
        raise ExhaustedError(
            f"{folder} would take {needed / 1e9:.1f} GB, and {SPARE_BYTES / 1e9:.0f} GB are to stay free; "
            f"the disk has {free / 1e9:.1f} GB left"
        )


def _write_shards(part: Path, tensors: list[Tensor], progress: Progress) -> None:
    """One file, or several with their index."""
    shards = list(_shards(tensors))
    several, started, index = len(shards) > 1, time.monotonic(), dict[str, str]()
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if several else "model.safetensors"
        index |= {tensor: name for tensor, _ in shard}
        with open(part / name, "wb") as file:
            _write(file, shard, lambda: progress(f"making {part.name}", time.monotonic() - started))
    if several:
        (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _shards(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """As few files as hold them, in their order."""
    shard: list[Tensor] = []
    for tensor in tensors:
        if shard and sum(map(_size, [*shard, tensor])) > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write(file: BinaryIO, shard: list[Tensor], progress: Callable[[], None]) -> None:
    header, end = {}, 0
    for name, extent in shard:
        start, end = end, end + _size((name, extent))
        header[name] = {"dtype": "BF16", "shape": list(extent), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in shard:
        for piece in _values(tensor):
            progress()
            file.write(piece.tobytes())


def _values(tensor: Tensor) -> Iterator[npt.NDArray[np.uint16]]:
    """The bfloat16 words of a tensor, piece by piece; the same for the same name every time."""
    name, extent = tensor
    random, count = np.random.default_rng(list(name.encode())), _size(tensor) // _WIDTH
    for start in range(0, count, _PIECE):
        values = np.empty(min(_PIECE, count - start), np.float32)
        if len(extent) > 1:
            random.standard_normal(out=values, dtype=np.float32)
            values *= SPREAD
        else:
            values.fill(0.0 if name.endswith(".bias") else 1.0)
        yield (values.view(np.uint32) >> 16).astype(np.uint16)
