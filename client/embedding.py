"""Embeddings of tokens, for a trusted worker that leaves them to its clients: from the client's own copy of the model.

They are, bit for bit, what a trusted worker would look up itself: at int8 a quantised row times its scale.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, InvalidArgumentError, PreconditionError
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters
from wire.quantize import quantize_rows
from wire.v1 import trusted_worker_pb2 as pb


class EmbeddingTable:
    """The embedding table of a model folder, read row by row. `shape` is (vocabulary, hidden). Close it when done.

    `precision` is that of the session. Raises CheckpointError for a folder that cannot be read, is sealed, or has no
    weights.
    """

    def __init__(self, folder: Path, precision: str) -> None:
        config = ModelConfig.from_hf(folder)
        if not any(folder.glob("*.safetensors")):
            sealed = any(folder.glob("*.safetensors.sealed"))
            what = "holds sealed weights only" if sealed else "holds no weights (*.safetensors)"
            raise CheckpointError(f"{folder} {what}: give a folder with the model itself")
        self.shape = config.vocabulary, config.hidden
        self._int8 = precision == "int8"
        ((self._tensor, _),) = parameters(config)[Name(Kind.EMBEDDING)].tensors
        self._checkpoint = Checkpoint(folder)

    def rows(self, token_ids: Iterable[int]) -> bytes:
        """Little-endian float32[tokens, hidden]. Raises InvalidArgumentError for an id that cannot exist."""
        return b"".join(map(self._row, token_ids))

    def close(self) -> None:
        """Close the files."""
        self._checkpoint.close()

    def _row(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.shape[0]:
            raise InvalidArgumentError(f"a token id is out of range: this model's ids are 0 to {self.shape[0] - 1}")
        weight = self._checkpoint.read_rows(self._tensor, self.shape, token_id, token_id + 1)
        if self._int8:
            quantized, scale = quantize_rows(weight)
            weight = np.multiply(quantized, scale[:, None], dtype=np.float32)
        return weight.astype("<f4", copy=False).tobytes()


def own_table(folder: Path | None, precision: str, opened: pb.OpenResponse) -> EmbeddingTable:
    """The table of this client's copy of the model. Raises PreconditionError where it cannot serve for `opened`."""
    why = "this trusted worker leaves embedding to its clients"
    if folder is None:
        raise PreconditionError(f"{why}: give the folder of a local copy of the model")
    try:
        table = EmbeddingTable(folder, precision)
    except CheckpointError as error:
        raise PreconditionError(f"{why}: {error}") from error
    if table.shape != (opened.vocabulary, opened.hidden):
        table.close()
        raise PreconditionError(f"{why}, but serves another model than the one in {folder}")
    return table
