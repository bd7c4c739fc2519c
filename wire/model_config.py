"""The architecture of a decoder, frozen. `ModelConfig.from_hf` reads it; the names it maps are in families.py."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wire import families
from wire.checkpoint import require_folder
from wire.errors import CheckpointError
from wire.families import Names, Rope


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and kinds of a decoder: norm, attention with h query heads over g key heads, norm, feed-forward part."""

    name: str  # the folder's name: what Load and Open ask for
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    max_context: int
    norm_eps: float
    rope: Rope | None  # None: learned positions, added to the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool  # lm_head is the embedding table
    names: Names
    eos: tuple[int, ...] = ()
    window: int = 0  # a token attends to so many last tokens, itself included; 0: to all
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE
    layer_norm: bool = False  # LayerNorm with bias; else RMSNorm
    gated: bool = True  # down(silu(gate) * up); else down(gelu_new(up))
    digest: bytes = b""  # SHA-256 of the files that this was read from

    @property
    def q_width(self) -> int:
        """Outputs of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, folder: Path) -> "ModelConfig":
        """Read config.json (and generation_config.json) of a folder. Raises CheckpointError with what is wrong."""
        require_folder(folder)
        raw, digest = _read(folder / "config.json")
        path = folder / "generation_config.json"
        generation, other = _read(path) if path.exists() else ({}, bytes(32))
        return replace(cls.from_dict(folder.resolve().name, raw, generation), digest=digest + other)

    @classmethod
    def from_dict(cls, name: str, raw: dict[str, Any], generation: dict[str, Any]) -> "ModelConfig":
        """The same from parsed files."""
        try:
            config = cls(name=name, eos=_eos(generation, raw), **families.fields(raw))
        except KeyError as error:
            raise CheckpointError(f"config.json lacks {error.args[0]}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("config.json has a field of the wrong type") from error
        if config.heads % config.kv_heads:
            raise CheckpointError(
                f"config.json: {config.heads} query heads cannot be shared out among {config.kv_heads} key heads"
            )
        if config.head_dim % 2 or (config.rope and config.rope.dims % 2):
            raise CheckpointError(f"config.json: a head of {config.head_dim} dims cannot be rotated in pairs")
        return config

    def inverse_frequencies(self) -> npt.NDArray[np.float32]:
        """How fast each pair of dims rotates, float32[dims / 2]; empty without RoPE."""
        rope = self.rope
        if rope is None:
            return np.empty(0, np.float32)
        exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
        frequencies: npt.NDArray[np.float32] = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
        scaling = rope.scaling
        if scaling is None:
            return frequencies
        turns = scaling.context * frequencies / np.float32(2 * np.pi)  # of a pair within the original context
        smooth = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequencies *= (1 - smooth) / np.float32(scaling.factor) + smooth
        return frequencies


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """A JSON object, and the SHA-256 of the bytes that it was read from."""
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: is this a model folder in Hugging Face layout?") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable as JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content, hashlib.sha256(data).digest()


def _eos(generation: dict[str, Any], raw: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json has the last word, as in transformers."""
    ids = generation.get("eos_token_id", raw.get("eos_token_id"))
    if ids is None:
        return ()
    found = tuple(ids) if isinstance(ids, list) else (ids,)
    if not all(type(one) is int and 0 <= one < 1 << 31 for one in found):
        raise CheckpointError("eos_token_id must be a token id or a list of them (config.json, generation_config.json)")
    return found
