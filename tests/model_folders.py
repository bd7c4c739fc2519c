"""Tiny model folders of every family, and what transformers says about them. Made from fixed seeds.

transformers has no class for ChatGLM3. Its reference is a GlmForCausalLM with the same weights, in a folder beside:

    GlmForCausalLM                                   ChatGLM3
    model.embed_tokens                               transformer.embedding.word_embeddings
    model.layers.N.input_layernorm                   transformer.encoder.layers.N.input_layernorm
    model.layers.N.self_attn.{q,k,v}_proj            ....self_attention.query_key_value   rows of q, then k, then v
    model.layers.N.self_attn.o_proj                  ....self_attention.dense
    model.layers.N.post_attention_layernorm          ....post_attention_layernorm
    model.layers.N.mlp.gate_up_proj                  ....mlp.dense_h_to_4h                gate first in both
    model.layers.N.mlp.down_proj                     ....mlp.dense_4h_to_h
    model.norm                                       transformer.encoder.final_layernorm
    lm_head                                          transformer.output_layer

Both compute the same: RMSNorm before each half of a block; the first half of a head's dims rotates, in pairs
(2i, 2i + 1), at base 10000; consecutive query heads share a key head; bias in q, k and v only; down(silu(gate) * up).
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 256,
    "eos_token_id": 300,
    "bos_token_id": 1,
}
_SPREAD = {  # of the weights: enough for varied answers, not too much for int8
    "llama": 0.08,
    "llama-bf16-tied-sharded": 0.08,
    "qwen2": 0.08,
    "qwen2-f16-tied": 0.08,
    "llama3-scaled": 0.1,
    "qwen3": 0.1,
    "mistral": 0.1,
    "gpt2": 0.15,
    "gpt2-bare": 0.15,
    "chatglm3": 0.1,
    "gpt2-untied": 0.15,
}
ASIDE = ("gpt2-untied",)  # for the tests that ask for it
MODELS = tuple(name for name in _SPREAD if name not in ASIDE)
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "",
    "max_position_embeddings": "n_positions",
}
_LLAMA3 = {  # pairs turn every 6, 20, 63, 199.. tokens: one above 16, two between, the others below 64
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_CHATGLM3 = {
    "embed_tokens": "embedding.word_embeddings",
    "norm": "encoder.final_layernorm",
    "input_layernorm": "input_layernorm",
    "self_attn.qkv": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def save(name: str, folder: Path) -> None:
    """Make the folder of a name in MODELS or ASIDE, with random gains and biases too, so that all of them count."""
    import torch

    torch.manual_seed(list(_SPREAD).index(name))
    model = _model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm, bias = "norm" in key or "ln_" in key, key.endswith("bias")
            parameter.normal_(1.0 if norm and not bias else 0.0, 0.2 if norm or bias else _SPREAD[name])
    dtype = torch.bfloat16 if "bf16" in name else torch.float16 if "f16" in name else torch.float32
    target = _twin(folder) if name == "chatglm3" else folder
    model.to(dtype).save_pretrained(target, max_shard_size="100KB" if "sharded" in name else "1GB")
    if name == "gpt2-bare":
        _save_bare(model, folder)
    if name == "chatglm3":
        _save_chatglm3(model, folder)


def _model(name: str) -> Any:
    import transformers as hf

    tied = "-tied" in name
    model: Any = None
    own: dict[str, Any]
    match name.partition("-")[0]:
        case "llama":
            own = {"attention_bias": not tied, "mlp_bias": not tied}
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **own, tie_word_embeddings=tied))
        case "qwen2":
            own = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
            model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, **own, tie_word_embeddings=tied))
        case "llama3":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_parameters=_LLAMA3))
        case "qwen3":
            model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=24))
        case "mistral":
            model = hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=8))
        case "gpt2":
            own = {_GPT2_NAMES.get(key, key): value for key, value in SIZES.items()}
            del own[""]
            model = hf.GPT2LMHeadModel(hf.GPT2Config(**own, tie_word_embeddings="-untied" not in name))
        case "chatglm3":
            own = {"head_dim": 16, "pad_token_id": 0, "rms_norm_eps": 1e-5}
            model = hf.GlmForCausalLM(hf.GlmConfig(**SIZES, **own, attention_bias=True, tie_word_embeddings=False))
    return model


def _save_bare(model: Any, folder: Path) -> None:
    """As GPT-2 is published: no prefix, and the causal masks among the tensors."""
    import torch
    from safetensors.torch import save_file

    size = model.config.n_positions
    masks = {
        f"h.{n}.attn.bias": torch.ones(size, size).tril().reshape(1, 1, size, size) for n in range(model.config.n_layer)
    }
    save_file(model.transformer.state_dict() | masks, folder / "model.safetensors", metadata={"format": "pt"})


def _save_chatglm3(model: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config, tensors = model.config, {"transformer.output_layer.weight": model.lm_head.weight.detach()}
    for key, tensor in _with_fused_qkv(model.model.state_dict()).items():
        block, ending = "", key.rpartition(".")[2]
        path = key.removesuffix("." + ending)
        if path.startswith("layers."):
            _, layer, path = path.split(".", 2)
            block = f"encoder.layers.{layer}."
        tensors[f"transformer.{block}{_CHATGLM3[path]}.{ending}"] = tensor
    rotary = torch.arange(0, config.head_dim // 2, 2) / (config.head_dim // 2)
    tensors["transformer.rotary_pos_emb.inv_freq"] = 1.0 / 10000**rotary
    folder.mkdir(parents=True)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    raw = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "ffn_hidden_size": config.intermediate_size,
        "fp32_residual_connection": False,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "original_rope": True,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": config.max_position_embeddings,
        "use_cache": True,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2))


def _with_fused_qkv(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    fused = {key: tensor for key, tensor in state.items() if not any(f".{p}_proj." in key for p in "qkv")}
    for key in [key for key in state if ".q_proj." in key]:
        fused[key.replace("q_proj", "qkv")] = torch.cat([state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"])
    return fused


def _twin(folder: Path) -> Path:
    return folder.with_name(folder.name + "-as-glm")


def reference_folder(folder: Path) -> Path:
    """The folder that transformers loads for a folder of `save`: itself but for ChatGLM3."""
    return _twin(folder) if _twin(folder).exists() else folder


@functools.lru_cache(maxsize=16)
def reference_model(folder: Path) -> Any:
    """transformers' model of a folder, in float32. Shared: not to be changed."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(1)  # tiny products: a second thread only waits
    model = AutoModelForCausalLM.from_pretrained(reference_folder(folder), dtype=torch.float32)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end of sequence
    return model


def transformers_logits(folder: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    """Reference logits float32[len(ids), vocabulary], computed in float32."""
    import torch

    with torch.no_grad():
        logits: npt.NDArray[np.float32] = reference_model(folder)(torch.tensor([ids])).logits[0].numpy()
    return logits


def greedy_reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    """transformers' next `count` greedy tokens, in float32; an end of sequence ends nothing."""
    import torch

    ids = torch.tensor([prompt])
    everything = torch.ones_like(ids)  # unless told, it takes a 0 for padding
    found = reference_model(folder).generate(ids, attention_mask=everything, max_new_tokens=count)[0].tolist()
    rest: list[int] = found[len(prompt) :]
    return rest
