"""The architecture of a decoder, frozen. `ModelConfig.from_hf` is the only code that knows Hugging Face's names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wire.checkpoint import require_folder
from wire.errors import CheckpointError

MAX_NUMBER = 1e12  # no finite constant of an architecture is larger
SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Llama-like decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

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
    rope_theta: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool  # lm_head is the embedding table
    eos: tuple[int, ...]

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
        raw = _json(folder / "config.json")
        architectures = raw.get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else "none"
        if architecture not in SUPPORTED:
            raise CheckpointError(f"architecture {architecture} is not supported; {', '.join(SUPPORTED)} are")
        try:
            _refuse_variants(raw)
            return cls._from_fields(folder, raw, qwen=architecture == "Qwen2ForCausalLM")
        except KeyError as error:
            raise CheckpointError(f"{folder}/config.json lacks {error.args[0]}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder}/config.json has a field of the wrong type") from error

    @classmethod
    def _from_fields(cls, folder: Path, raw: dict[str, Any], qwen: bool) -> "ModelConfig":
        heads = _positive(raw, "num_attention_heads")
        hidden = _positive(raw, "hidden_size")
        bias = _flag(raw, "attention_bias")
        config = cls(
            name=folder.resolve().name,
            layers=_positive(raw, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=_positive(raw, "num_key_value_heads", heads),
            head_dim=_positive(raw, "head_dim", hidden // heads),
            ffn=_positive(raw, "intermediate_size"),
            vocabulary=_positive(raw, "vocab_size"),
            max_context=_positive(raw, "max_position_embeddings"),
            norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=_number(_rope(raw) if "rope_theta" in _rope(raw) else raw, "rope_theta", 10000.0),
            qkv_bias=qwen or bias,
            o_bias=bias and not qwen,
            mlp_bias=_flag(raw, "mlp_bias"),
            tied=_flag(raw, "tie_word_embeddings"),
            eos=_eos(folder, raw),
        )
        if config.heads % config.kv_heads or config.head_dim % 2:
            raise CheckpointError("config.json: query heads must be a multiple of key heads, and head_dim even")
        return config


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: is this a model folder in Hugging Face layout?") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable as JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _positive(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive 31-bit integer; `default` stands for a missing or null field. Raises KeyError, CheckpointError."""
    value = raw[key] if default is None else default if raw.get(key) is None else raw[key]
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"config.json: {key} must be a positive integer below 2^31")
    return value


def _number(raw: dict[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    if type(value) not in (int, float) or not 0 < value < MAX_NUMBER:
        raise CheckpointError(f"config.json: {key} must be a positive number")
    return float(value)


def _flag(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be true or false")
    return value


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("rope_scaling") or raw.get("rope_parameters") or {}


def _refuse_variants(raw: dict[str, Any]) -> None:
    """What would silently give other results is refused by name."""
    kind = _rope(raw).get("rope_type") or _rope(raw).get("type") or "default"
    if kind != "default":
        raise CheckpointError(f"RoPE scaling of type {kind} is not supported yet")
    if raw.get("use_sliding_window"):
        raise CheckpointError("sliding-window attention is not supported yet")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"activation {raw['hidden_act']} is not supported; silu is")
    if raw.get("quantization_config"):
        raise CheckpointError("quantised checkpoints are not supported: give float32, float16 or bfloat16 weights")


def _eos(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json has the last word, as in transformers."""
    path = folder / "generation_config.json"
    generation = _json(path) if path.exists() else {}
    ids = generation.get("eos_token_id", raw.get("eos_token_id"))
    if ids is None:
        return ()
    found = tuple(ids) if isinstance(ids, list) else (ids,)
    if not all(type(one) is int and 0 <= one < 1 << 31 for one in found):
        raise CheckpointError("eos_token_id must be a token id or a list of them (config.json, generation_config.json)")
    return found
