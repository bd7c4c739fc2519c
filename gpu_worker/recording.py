"""What this worker received, sent and held, on disk: `--record DIR`, for whoever wants to know what there is to learn.

A recording is a folder of segments, 00000001.jsonl with 00000001.bin beside it and so on: an index, one JSON object a
line, and the bytes of the tensors that it names by dtype, shape and offset. Lines are of these kinds:

    start   a process began
    load    a model was loaded
    call    one call: its operation (proto, base64), the tensor that came, the tensor that went, how it ended
    held    a tensor of a pass on its way through the layers: residual, qk, v, attention
    cache   keys and values of a sequence, at the last moment before they are dropped, and right after they are wiped

A line is written after its tensors, so a reader who follows a running worker never sees half a call. Segments that
exist are never touched; of this process's own, the oldest go when there are more than `keep`. A disk that is full ends
the recording, not the work. Only the compute thread comes here.
"""

import base64
import json
import logging
import time
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.calls import Call
from wire.errors import CleaveError, PreconditionError

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 << 20
ALIGNED = 64  # of every tensor in its segment: readers need not copy

Tensor = npt.NDArray[Any] | torch.Tensor


class Recording:
    """One folder, for all streams of this process."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        """`keep`: the most segments that stay; None: all. Raises PreconditionError for a folder that cannot be had."""
        self._folder, self._keep = folder, keep
        self._begun: list[int] = []
        self._streams = 0
        self._index: TextIO | None = None
        self._tensors: BinaryIO | None = None
        self._start = time.monotonic()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._begin(max((int(path.stem) for path in folder.glob("[0-9]*.jsonl")), default=0) + 1)
        except (OSError, ValueError) as error:
            raise PreconditionError(f"cannot record in {folder}: it must be a folder to write in") from error
        self.write("start")

    def stream(self) -> "StreamRecording":
        """For the next stream."""
        self._streams += 1
        return StreamRecording(self, self._streams)

    def write(self, kind: str, **fields: Any) -> None:
        """One line; fields that are tensors become places in the segment."""
        if self._index is None or self._tensors is None:
            return
        try:
            if self._tensors.tell() >= SEGMENT_BYTES:
                self._begin(self._begun[-1] + 1)
            placed = {name: self._placed(value) for name, value in fields.items() if value is not None}
            self._tensors.flush()
            line = {"kind": kind, "us": round((time.monotonic() - self._start) * 1e6), **placed}
            self._index.write(json.dumps(line) + "\n")
            self._index.flush()
        except OSError as error:
            log.warning("the recording ends: %s", type(error).__name__)
            self._index = self._tensors = None

    def _begin(self, number: int) -> None:
        """The next segment."""
        for file in (self._index, self._tensors):
            if file is not None:
                file.close()
        self._tensors = (self._folder / f"{number:08}.bin").open("xb")
        self._index = (self._folder / f"{number:08}.jsonl").open("x", encoding="ascii")
        self._begun.append(number)
        if self._keep is not None and len(self._begun) > self._keep:
            oldest = self._begun.pop(0)
            for suffix in ("jsonl", "bin"):
                (self._folder / f"{oldest:08}.{suffix}").unlink(missing_ok=True)

    def _placed(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray) or self._tensors is None:
            return value
        self._tensors.write(bytes(-self._tensors.tell() % ALIGNED))
        at = self._tensors.tell()
        self._tensors.write(np.ascontiguousarray(value).data)
        return {"dtype": value.dtype.name, "shape": value.shape, "at": at}


class StreamRecording:
    """The lines of one stream."""

    def __init__(self, recording: Recording, number: int) -> None:
        self._recording, self._number = recording, number

    def call(self, call: Call, answer: Tensor | None, refused: CleaveError | None) -> None:
        """A call, once it is through."""
        operation = base64.b64encode(call.operation.SerializeToString(deterministic=True)).decode()
        code = None if refused is None else refused.code.value[0]
        self._write("call", id=call.id, operation=operation, up=call.tensor, down=answer, refused=code)

    def held(self, name: str, layer: int, tensor: torch.Tensor) -> None:
        """A tensor of a pass."""
        self._write("held", name=name, layer=layer, tensor=tensor)

    def cache(self, sequence: int, event: str, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A sequence's cache, float32[layers, kv_heads, tokens, head_dim] each; `event` is drop or wipe."""
        self._write("cache", sequence=sequence, event=event, keys=keys, values=values)

    def _write(self, kind: str, **fields: Any) -> None:
        self._recording.write(kind, stream=self._number, **fields)
