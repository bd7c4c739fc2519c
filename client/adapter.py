"""A LoRA adapter in PEFT's layout on its way to a trusted worker, which alone reads what is in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from wire.errors import CheckpointError
from wire.v1 import trusted_worker_pb2 as pb

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MESSAGE_BYTES = (1 << 20) - (1 << 16)  # of one serialised UploadRequest, at most
PIECE_BYTES = MESSAGE_BYTES - 64  # of it, the adapter's


@dataclass(frozen=True)
class Adapter:
    """Two files: the whole `config`, and where the `size` bytes of the weights lie."""

    config: bytes
    weights: Path
    size: int

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A PEFT folder. Raises CheckpointError, with what to give instead, before anything is sent."""
        config, weights = folder / CONFIG, folder / WEIGHTS
        for path in (config, weights):
            if not path.is_file():
                pickled = path is weights and (folder / "adapter_model.bin").exists()
                hint = "; adapter_model.bin is no substitute: save with safe_serialization=True" if pickled else ""
                raise CheckpointError(f"{path} is missing: give a folder that PEFT saved{hint}")
        try:
            found = cls(config.read_bytes(), weights, weights.stat().st_size)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read") from error
        if len(found.config) > PIECE_BYTES:
            raise CheckpointError(f"{config} is larger than {PIECE_BYTES} bytes: it is no adapter's configuration")
        if not found.config or not found.size:
            raise CheckpointError(f"{config if found.size else weights} is empty")
        return found

    def requests(self) -> Iterator[pb.UploadRequest]:
        """The messages of one upload, in order. Raises CheckpointError when the file is not what it was."""
        yield pb.UploadRequest(config=self.config, weights_size=self.size)
        left = self.size
        try:
            with self.weights.open("rb") as file:
                while left and (piece := file.read(min(PIECE_BYTES, left))):
                    left -= len(piece)
                    yield pb.UploadRequest(weights=piece)
        except OSError as error:
            raise CheckpointError(f"{self.weights} cannot be read") from error
        if left:
            raise CheckpointError(f"{self.weights} became shorter while it was read")
