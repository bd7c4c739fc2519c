"""`cleave attest model`: the digest that a trusted worker claims for a model folder, as a policy entry.

It covers config.json, generation_config.json and every byte of the weights, by name (wire/measured.py). It does not
cover the tokenizer, which only clients use, nor the folder's name. A sealed model has the digest of what was sealed.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path

from wire.errors import CheckpointError
from wire.measured import MeasuredCheckpoint
from wire.model_config import ModelConfig


def run(options: argparse.Namespace) -> int:
    """Print the entry, or with --json one object: `model`, `model_digest`; 0. Raises CheckpointError."""
    config, digest = _measure(options.model)
    if options.json:
        print(json.dumps({"model": config.name, "model_digest": digest}))
    else:
        print(f'[claims]\n# {config.name}\nmodel_digests = ["{digest}"]')
    return 0


def _measure(folder: Path) -> tuple[ModelConfig, str]:
    config = ModelConfig.from_hf(folder)
    if any(folder.glob("*.safetensors.sealed")) and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} is sealed: its digest is that of the opened model. Give the folder that was sealed"
        )
    with closing(MeasuredCheckpoint(folder, config)) as checkpoint:
        return config, checkpoint.model_digest.hex()
