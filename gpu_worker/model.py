"""A model folder in memory, ready for calls. It never changes once it is made.

Importing this file imports torch and numba.
"""

from pathlib import Path

from gpu_worker.decoder import Decoder
from gpu_worker.ring import Ring
from gpu_worker.weights import ParameterSet
from wire.checkpoint import Checkpoint
from wire.errors import PreconditionError
from wire.linears import all_specs
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters, weight_name
from wire.v1 import gpu_worker_pb2 as pb


class Model:
    """A folder in one precision: no `ring` in float32, no `decoder` where only ring products are served.

    A sealed folder has a configuration and no weights: its decoder finds only what a peer provisions.
    """

    def __init__(self, folder: Path, precision: int, device: str, ring_only: bool) -> None:
        """Raises CheckpointError for a folder that cannot be read, PreconditionError for a sealed one that would have
        to be int8.
        """
        self.config = ModelConfig.from_hf(folder)
        self.precision = precision
        known = parameters(self.config)
        self.parameter_bytes = sum(4 * p.rows * p.width for p in known.values())  # as float32
        int8 = precision == pb.PRECISION_INT8
        loaded = ParameterSet(device, int8)
        if not _is_sealed(folder):
            ring_names = {weight_name(self.config, of) for of in all_specs(self.config)} | {Name(Kind.EMBEDDING)}
            checkpoint = Checkpoint(folder)
            try:
                loaded.read(checkpoint, (p for p in known.values() if not ring_only or p.name in ring_names))
            finally:
                checkpoint.close()
        elif int8:
            raise PreconditionError("the model is sealed: it can be loaded as float32 only, without its weights")
        self.ring = Ring(self.config, loaded, device) if int8 else None
        self.decoder = None if ring_only else Decoder(self.config, (loaded,), device)


def _is_sealed(folder: Path) -> bool:
    return any(folder.glob("*.safetensors.sealed")) and not any(folder.glob("*.safetensors"))
