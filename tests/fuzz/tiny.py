"""Model folders so small that a call takes microseconds: hidden 16, two layers, 31 tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from wire.model_config import ModelConfig
from wire.parameters import parameters

VOCABULARY, CONTEXT, EOS = 31, 192, 30
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": EOS,
}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": CONTEXT,
    "vocab_size": VOCABULARY,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES | {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "qwen3": _SIZES | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 12},
    "mistral": _SIZES | {"architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "gpt2": _GPT2,
    "sealed": _SIZES | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
}


def save_all(root: Path) -> dict[str, Path]:
    """A folder for each name in CONFIGS. "sealed" has a configuration and no weights that a GPU worker can read."""
    folders = {}
    for seed, name in enumerate(CONFIGS):
        folders[name] = root / name
        folders[name].mkdir(parents=True, exist_ok=True)
        (folders[name] / "config.json").write_text(json.dumps(CONFIGS[name]))
        if name == "sealed":
            (folders[name] / "model.safetensors.sealed").write_bytes(b"nothing that anybody could open")
        else:
            _save_weights(folders[name], seed)
    return folders


def _save_weights(folder: Path, seed: int) -> None:
    config, random = ModelConfig.from_hf(folder), np.random.default_rng(seed)
    tensors = {}
    for parameter in parameters(config).values():
        for tensor, rows in parameter.tensors:
            shape = (rows,) if parameter.width == 1 else (rows, parameter.width)
            values = random.normal(0, 0.3, shape).astype(np.float32)
            tensors[tensor] = np.ascontiguousarray(values.T) if parameter.transposed else values
    save_file(tensors, folder / "model.safetensors")
