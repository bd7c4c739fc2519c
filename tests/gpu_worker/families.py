"""Tiny random models of every family, saved as Hugging Face folders, and what transformers makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more))


def qwen2(**more: Any) -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, **more))


def qwen3(**more: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16, **more))


def mistral(**more: Any) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, **more))


def gpt2(**more: Any) -> Any:
    sizes: dict[str, Any] = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128, "n_inner": 100}
    tokens: dict[str, Any] = {"vocab_size": 261, "bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens, initializer_range=0.2, **more))


def glm() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    more: dict[str, Any] = {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False, "pad_token_id": None}
    return transformers.GlmForCausalLM(transformers.GlmConfig(**SIZES, **more, rope_parameters=rope))


MAKERS: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "qwen-tied": (lambda: qwen2(tie_word_embeddings=True), torch.float32),
    "qwen-untied-bf16": (lambda: qwen2(tie_word_embeddings=False, rope_theta=1e6), torch.bfloat16),
    "llama-untied": (lambda: llama(tie_word_embeddings=False), torch.float32),
    "llama-biased-bf16": (lambda: llama(attention_bias=True, mlp_bias=True, head_dim=16), torch.bfloat16),
    "llama3": (lambda: llama(rope_parameters=LLAMA3), torch.float32),
    "mistral": (lambda: mistral(sliding_window=5), torch.float32),
    "qwen3": (qwen3, torch.float32),
    "gpt2-tied": (gpt2, torch.float32),
    "gpt2-untied": (lambda: gpt2(tie_word_embeddings=False), torch.float32),
    "chatglm": (glm, torch.float32),
}


CHATGLM: dict[str, Any] = {
    "architectures": ["ChatGLMModel"],
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 100,
    "num_attention_heads": 6,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 261,
    "seq_length": 128,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "tie_word_embeddings": False,
}


def save(name: str, folder: Path) -> None:
    """Write a model's folder. Biases and norm gains start as 0 and 1: they are made to count."""
    make, dtype = MAKERS[name]
    torch.manual_seed(list(MAKERS).index(name))
    model = make().to(dtype)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("bias") or "norm" in key or ".ln_" in key:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    if name == "chatglm":
        model.save_pretrained(folder / "glm")
        _write_chatglm(model, folder)
    else:
        model.save_pretrained(folder)


def reference(folder: Path) -> Any:
    """What transformers makes of a folder, in float32."""
    theirs = folder / "glm" if (folder / "glm").exists() else folder
    return transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()


def _write_chatglm(model: Any, folder: Path) -> None:
    """transformers has the architecture under another name, with other names for the tensors."""
    state, stem = model.state_dict(), "transformer.encoder.layers.{}."
    tensors = {
        "transformer.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": state["model.norm.weight"],
        "transformer.output_layer.weight": state["lm_head.weight"],
    }
    for layer in range(CHATGLM["num_layers"]):
        theirs, ours = f"model.layers.{layer}.", stem.format(layer)
        for ending in ("weight", "bias"):
            parts = [state[f"{theirs}self_attn.{part}_proj.{ending}"] for part in "qkv"]
            tensors[f"{ours}self_attention.query_key_value.{ending}"] = torch.cat(parts)
        for name, own in {
            "self_attn.o_proj": "self_attention.dense",
            "mlp.gate_up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
        }.items():
            tensors[f"{ours}{own}.weight"] = state[f"{theirs}{name}.weight"]
    save_file(tensors, folder / "model.safetensors")
    config = CHATGLM | {"layernorm_epsilon": model.config.rms_norm_eps}
    (folder / "config.json").write_text(json.dumps(config))
