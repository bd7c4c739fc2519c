"""A checkpoint in memory, ready for calls. It never changes once it is made.

Importing this file imports torch and numba.
"""

from collections.abc import Mapping
from pathlib import Path

from gpu_worker.decoder import Decoder
from gpu_worker.ring import Ring
from gpu_worker.weights import Int8Weights, Weights, embedding_spec, read_float32, read_int8
from wire.checkpoint import Checkpoint
from wire.linears import Linear, all_specs
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb


class Model:
    """A checkpoint in one precision: no `ring` in float32, no `decoder` where only ring products are served."""

    def __init__(self, folder: Path, precision: int, device: str, ring_only: bool) -> None:
        """Raises CheckpointError for a folder that cannot be read."""
        self.config = ModelConfig.from_hf(folder)
        self.precision = precision
        self.ring: Ring | None = None
        self.decoder: Decoder | None = None
        checkpoint = Checkpoint(folder)
        try:
            weights = self._read_weights(checkpoint, device)
            if not ring_only:
                self.decoder = self._build_decoder(checkpoint, weights, device)
        finally:
            checkpoint.close()

    def _read_weights(self, checkpoint: Checkpoint, device: str) -> Mapping[tuple[int, Linear], Weights]:
        specs = all_specs(self.config)
        if self.precision == pb.PRECISION_FLOAT32:
            return {(s.layer, s.linear): read_float32(checkpoint, s, device) for s in specs}
        weights: dict[tuple[int, Linear], Int8Weights] = {
            (s.layer, s.linear): read_int8(checkpoint, s, device) for s in specs
        }
        self.ring = Ring(weights)
        return weights

    def _build_decoder(
        self, checkpoint: Checkpoint, weights: Mapping[tuple[int, Linear], Weights], device: str
    ) -> Decoder:
        embedding = weights[0, Linear.LM_HEAD]
        if not self.config.tied:
            read = read_float32 if self.precision == pb.PRECISION_FLOAT32 else read_int8
            embedding = read(checkpoint, embedding_spec(self.config), device)
        decoder = Decoder(self.config, weights, embedding, device)
        decoder.read_small(checkpoint)
        return decoder
